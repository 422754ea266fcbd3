"""The last step of durability: the seam's calls do reach the kernel. Nothing above the seam could tell (F3, I2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.store import DiskCalls, Store

from tests.crash.world import SEGMENT_BYTES, chunk, small_world


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of what the kernel was asked to make durable."""
    inodes: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return inodes


def test_a_files_fsync_is_the_kernels(tmp_path: Path, synced: list[int]) -> None:
    fd = DiskCalls().create(str(tmp_path / "a"))
    DiskCalls().fsync(fd)
    DiskCalls().close(fd)
    assert synced == [(tmp_path / "a").stat().st_ino]


def test_a_folders_fsync_is_the_kernels(tmp_path: Path, synced: list[int]) -> None:
    DiskCalls().fsync_dir(str(tmp_path))
    assert synced == [tmp_path.stat().st_ino]


def test_a_clean_stop_makes_the_index_durable_before_it_vouches_for_it(tmp_path: Path) -> None:
    """LMDB isn't behind the seam: whether it was asked to sync is all that can be seen."""
    steps: list[str] = []

    class Env:
        def __init__(self, env: Any) -> None:
            self._env = env

        def sync(self, force: bool) -> None:
            steps.append(f"sync {force}")
            self._env.sync(force)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._env, name)

    class Disk(DiskCalls):
        def create(self, path: str) -> int:
            steps.append(Path(path).name)
            return super().create(path)

    store = Store(tmp_path / "s", capacity_bytes=64 << 20, disk=Disk())
    index: Any = store._core.index
    index._env = Env(index._env)
    steps.clear()
    store.close()
    assert steps == ["sync True", "clean.tmp"]


def test_a_full_segment_of_what_must_be_kept_is_synced_when_it_is_closed(
    tmp_path: Path, synced: list[int]
) -> None:
    """Else one commit would have to sync all of a large checkpoint, and its descriptors pile up until then."""
    with small_world(1):
        store = Store(tmp_path / "s", capacity_bytes=4 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
        store.keep("a", True)
        synced.clear()
        store.put("a", chunk(1), 60_000, bytes(60_000))
        assert not synced
        store.put("a", chunk(2), 60_000, bytes(60_000))
        first, _ = sorted((tmp_path / "s" / "segments").glob("*/*"))
        assert synced == [first.stat().st_ino]
        store.close()
