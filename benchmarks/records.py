"""What the sections on records share: the same records as files, as one flat file, and in a pool that holds them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchcache as tc
from benchmarks.findings import Scale
from benchmarks.places import Lane, WarmPool, local_pool, memory_folder, write_files
from torchcache.data.outputs import Output

Read = Callable[[list[int]], Sequence[Any]]
"""A batch of records by their numbers; each has a length in bytes and the buffer protocol."""

RECORD_BYTES = 114_660
BATCH = 256
OBJECT_BYTES = 146_600_628


@dataclass(frozen=True)
class Shape:
    """`count` records of `size` bytes, read in batches."""

    name: str
    size: int
    count: int
    batch: int

    @property
    def bytes(self) -> int:
        return self.size * self.count

    def batches(self, seed: int = 1) -> list[list[int]]:
        """All records once, shuffled."""
        order = random.Random(seed).sample(range(self.count), self.count)
        return [order[at : at + self.batch] for at in range(0, self.count, self.batch)]


def records_shape(scale: Scale) -> Shape:
    """More records than the CPU's caches hold."""
    if scale.tiny:
        return Shape("8 x 114,660 B", RECORD_BYTES, 16, 8)
    return Shape("256 x 114,660 B", RECORD_BYTES, 2048, BATCH)


def objects_shape(scale: Scale) -> Shape:
    """The samples of MLPerf's 3D-Unet, one at a time."""
    if scale.tiny:
        return Shape("9,000,000 B", 9_000_000, 1, 1)
    return Shape("146,600,628 B", OBJECT_BYTES, 3, 1)


@dataclass(frozen=True)
class Ground:
    """The same records three times. `samples` are those of the pool, of which it holds every byte."""

    shape: Shape
    source: Path
    flat: Path
    warm: WarmPool


@contextmanager
def ground(shape: Shape, *, servers: int = 1, lane: Lane | None = None) -> Iterator[Ground]:
    """Files in memory, and a pool that has staged them. `lane` forces one."""
    with memory_folder() as root:
        source = root / "source"
        files = write_files(source, [shape.size] * shape.count)
        flat = root / "flat"
        with flat.open("wb") as joined:
            for file in files:
                joined.write(file.read_bytes())
        capacity_bytes = 2 * shape.bytes + (servers << 28)
        with local_pool(root / "pool", capacity_bytes=capacity_bytes, servers=servers, lane=lane) as warm:
            tc.CachedDataset.from_files(source, pool=warm.pool).stage(progress=False)
            yield Ground(shape, source, flat, warm)


def check(ground: Ground, read: Read) -> None:
    """That what a contender reads is what the files hold. Raises RuntimeError."""
    batch = ground.shape.batches()[0]
    for number, found in zip(batch, read(batch), strict=True):
        if bytes(memoryview(found)) != (ground.source / f"{number:05d}").read_bytes():
            raise RuntimeError(f"record {number} isn't what its file holds")


def reader(ground: Ground, output: Output) -> Read:
    """`__getitems__` of the records as this output; "numpy" is into buffers that are used again."""
    return tc.CachedDataset.from_files(ground.source, pool=ground.warm.pool, output=output).__getitems__


def all_of(shape: Shape, read: Read) -> Callable[[], int]:
    """A round: all records once, batch by batch; nobody keeps what was read before. Gives the bytes."""
    batches = shape.batches()
    return lambda: sum(len(record) for batch in batches for record in read(batch))
