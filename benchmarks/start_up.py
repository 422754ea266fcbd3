"""How long a store takes to open: after a clean stop, after a kill, and with an index that is none.

After a kill the index is thrown away and every segment scanned, so a kill is imitated by taking the mark of a clean
stop away. `--disk FOLDER` measures on that disk too, with the page cache of the segments dropped before each start.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchcache_server.store import Store

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.tables import show
from torchcache.model import ChunkId, ObjectId

_BATCH = 512
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Shape:
    """`chunks` chunks of `size` bytes, one an object."""

    chunks: int
    size: int


MILLION = Shape(1_000_000, 1024)
MOST_S = Goal(bound=30, of="value", sense="at most")
"""Of a million chunks: seconds, not minutes."""
TINY = Shape(2_000, 1024)


@dataclass(frozen=True)
class StartUp:
    """Seconds from `Store(...)` to its return. `cold`: nothing of the segments was in memory."""

    place: str
    chunks: int
    size: int
    segments: int
    cold: bool
    clean_s: float
    killed_s: float
    no_index_s: float


def open_in_each_state(shape: Shape, folder: Path, *, cold: bool) -> StartUp:
    """Fills a store in `folder` and opens it in the three states, each time finding every chunk again."""
    path = folder / "store"
    segments = fill(path, shape)
    states: list[Callable[[Path], None]] = [stopped_in_order, killed, without_index]
    times = []
    for state in states:
        state(path)
        if cold:
            drop_cache(path)
        started = time.perf_counter()
        store = open_store(path, shape)
        times.append(time.perf_counter() - started)
        check(store, shape)
        store.close()
    return StartUp(str(folder.parent), shape.chunks, shape.size, segments, cold, *times)


def open_store(path: Path, shape: Shape) -> Store:
    """With the default size of segments, which a store of this capacity would have."""
    return Store(path, capacity_bytes=max(2 * shape.chunks * (shape.size + 512), 1 << 26))


def fill(path: Path, shape: Shape) -> int:
    """Stores all chunks, in one namespace, and stops in order; returns the number of segments."""
    payload = os.urandom(shape.size)
    store = open_store(path, shape)
    for first in range(0, shape.chunks, _BATCH):
        numbers = range(first, min(first + _BATCH, shape.chunks))
        store.put_many("bench", [(chunk(n), shape.size, payload) for n in numbers])
    segments = store.usage().segments
    store.close()
    return segments


def chunk(number: int) -> ChunkId:
    """Named as files of a dataset are."""
    return ChunkId(
        ObjectId("s3", f"bucket/train/{number % 1000:04d}/{number:012d}.jpeg", "114660-17e2b1c0de"), 0
    )


def stopped_in_order(path: Path) -> None:
    """As it is."""


def killed(path: Path) -> None:
    (path / "clean").unlink()


def without_index(path: Path) -> None:
    """Stopped in order, but the index is garbage."""
    (path / "index" / "data.mdb").write_bytes(b"garbage!" * 1024)


def drop_cache(path: Path) -> None:
    """Makes the next reads of the store's files come from the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(store: Store, shape: Shape) -> None:
    found = store.usage().chunks
    if found != shape.chunks or not all(
        store.verify(chunk(n)) for n in (0, shape.chunks // 2, shape.chunks - 1)
    ):
        raise RuntimeError(f"{found} of {shape.chunks} chunks are there")


@contextmanager
def folder_on(place: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="start-up-", dir=place) as folder:
        yield Path(folder)


def start_ups(shapes: list[Shape], disk: Path | None) -> list[StartUp]:
    """Every shape in memory, and cold on the disk if there is one to measure on."""
    results = []
    for shape in shapes:
        with folder_on(_MEMORY if _MEMORY.is_dir() else None) as folder:
            results.append(open_in_each_state(shape, folder, cold=False))
        if disk is not None:
            with folder_on(disk) as folder:
                results.append(open_in_each_state(shape, folder, cold=True))
    return results


def measure(scale: Scale) -> Findings:
    """In memory, once."""
    return findings(start_ups([TINY if scale.tiny else MILLION], None))


def findings(results: list[StartUp]) -> Findings:
    rows = []
    for r in results:
        place = f"{r.place}, nothing of it in memory" if r.cold else r.place
        for state, took_s in (
            ("a stop in order", r.clean_s),
            ("a kill", r.killed_s),
            ("a lost index", r.no_index_s),
        ):
            what = f"{r.chunks:,} chunks of {r.size:,} B in {r.segments:,} segments on {place}, after {state}"
            goal = MOST_S if r.chunks == MILLION.chunks and not r.cold else None
            rows.append(Row(what=what, unit="s", ours=took_s, goal=goal))
    return Findings(title="How long a store takes to open", rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--chunks", type=int, default=MILLION.chunks)
    parser.add_argument("--size", type=int, default=MILLION.size, help="bytes of a chunk")
    parser.add_argument("--disk", type=Path, help="a folder on a disk, to measure there too")
    args = parser.parse_args()
    show(findings(start_ups([Shape(args.chunks, args.size)], args.disk)), 1)


if __name__ == "__main__":
    main()
