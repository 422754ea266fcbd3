"""The bound on what saves and loads take beside the state, by the kernel's count of a process that saves and loads."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.e2e import memory_child
from tests.e2e.memory_child import MIB, STATE_BYTES
from tests.waiting import PATIENCE_S

BOUND = 64 * MIB
BESIDE = 64 * MIB
"""Plans, manifests, threads, and what the lane and gRPC send from and receive into."""


@pytest.mark.parametrize(
    ("kind", "compression"),
    [
        ("strided", None),
        ("views", None),
        ("small", None),
        ("contiguous", None),
        ("objects", None),
        ("noise", "zstd"),
    ],
)
def test_no_more_is_taken_than_was_allowed(
    tmp_path: Path, kind: str, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is freed goes back at once: else malloc keeps some, and some was there before.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "16384")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=memory_child.main, args=(str(tmp_path), kind, BOUND, compression, theirs)
    )
    process.start()
    theirs.close()
    try:
        assert ours.poll(2 * PATIENCE_S)
        saved, loaded = ours.recv()
    finally:
        process.kill()
        process.join()
    print(f"{kind}, {compression}: a save took {saved / MIB:.0f} MiB, a load {loaded / MIB:.0f} MiB")
    assert STATE_BYTES > 3 * (BOUND + BESIDE)
    assert saved < BOUND + BESIDE
    assert loaded < BOUND + BESIDE
