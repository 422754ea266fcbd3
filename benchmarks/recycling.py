"""What it gains to write into files of segments that are gone: the store's `put`, into fresh ones and into spares."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from torchcache_server.store import Store

from benchmarks.findings import Findings, Row, Scale
from benchmarks.rounds import Result, alternate
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId

CHUNKS: Final = 128
TINY_CHUNKS: Final = 2
_AT_ONCE: Final = 8


def measure(scale: Scale) -> Findings:
    """Recycled beside fresh."""
    found = compare(rounds=scale.rounds, chunks=TINY_CHUNKS if scale.tiny else CHUNKS)
    recycled, fresh = found.values()
    row = Row(
        what=f"{TINY_CHUNKS if scale.tiny else CHUNKS} chunks of 4 MiB into the store, and gone again",
        unit="ms",
        ours=recycled.median_s * 1e3,
        bare=fresh.median_s * 1e3,
        against=fresh.name,
    )
    return Findings(
        title="Recycled segments", rows=[row], contenders={"chunks of 4 MiB": list(found.values())}
    )


def compare(*, rounds: int, chunks: int = CHUNKS) -> dict[str, Result]:
    """Writes chunks of 4 MiB and lets them go again, in turn with and without recycling; on tmpfs if there is one.

    Without, the files are unlinked, which is part of what fresh pages cost. Both stores are open all the while.
    """
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    payload = os.urandom(CHUNK_BYTES)
    capacity_bytes = chunks * CHUNK_BYTES + (1 << 28)
    with ExitStack() as closing:
        closing.callback(shutil.rmtree, root)
        recycled = Store(root / "recycled", capacity_bytes=capacity_bytes)
        closing.callback(recycled.close)
        fresh = Store(root / "fresh", capacity_bytes=capacity_bytes)
        closing.callback(fresh.close)
        return alternate(
            {
                "torchcache, recycled segments": lambda: _write(
                    recycled, payload, chunks, let_go=recycled.drop
                ),
                "fresh segments": lambda: _write(fresh, payload, chunks, let_go=fresh.evict),
            },
            rounds=rounds,
        )


def _write(store: Store, payload: bytes, chunks: int, *, let_go: Callable[[str], int]) -> int:
    object = ObjectId("s3", "bench", "1")
    for first in range(0, chunks, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, chunks))
        store.put_many("bench", [(ChunkId(object, n), chunks * CHUNK_BYTES, payload) for n in numbers])
    let_go("bench")
    return chunks * CHUNK_BYTES
