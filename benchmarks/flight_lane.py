"""The flight lane against bare Flight: the same extents, the same order, in the same run, on tmpfs."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torchcache as tc
from benchmarks.bare_flight import bare_server, take
from benchmarks.rounds import Result, alternate
from torchcache.model import Extent


@dataclass(frozen=True)
class Shape:
    """`count` objects of `size` bytes, read in one request."""

    name: str
    size: int
    count: int


SHAPES = (Shape("256 records of 114,660 B", 114_660, 256), Shape("1 object of 146,600,628 B", 146_600_628, 1))
TINY = (Shape("8 records of 114,660 B", 114_660, 8), Shape("1 object of 9,000,000 B", 9_000_000, 1))


@dataclass(frozen=True)
class Comparison:
    shape: str
    ours: Result
    bare_one: Result
    bare_views: Result

    @property
    def ratio(self) -> float:
        """Ours as a share of the plain bare stream, a batch an extent."""
        return self.bare_one.median_s / self.ours.median_s

    @property
    def ratio_to_views(self) -> float:
        """Ours as a share of the best bare stream found: our own batches, but prepared beforehand and unverified."""
        return self.bare_views.median_s / self.ours.median_s


def compare(shape: Shape, *, rounds: int) -> Comparison:
    """Ours: Pool.read through the whole API, every byte verified. Bare: see bare_flight.py."""
    folder_of_files = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder_of_files) as folder:
        root = Path(folder)
        source = root / "source"
        source.mkdir()
        payload = random.Random(0).randbytes(shape.size * shape.count)
        for i in range(shape.count):
            (source / f"{i:05d}").write_bytes(payload[i * shape.size : (i + 1) * shape.size])
        (root / "flat").write_bytes(payload)
        order = random.Random(1).sample(range(shape.count), shape.count)
        with (
            tc.LocalPool(root / "pool", capacity="2GB") as pool,
            bare_server(root / "flat", shape.size, order) as client,
        ):
            objects = list(pool.list(f"file://{source}"))
            extents = [Extent(objects[i]) for i in order]
            first = pool.read(extents)
            expected = [payload[i * shape.size : (i + 1) * shape.size] for i in order]
            if [bytes(view) for view in first] != expected:
                raise RuntimeError("the pool returned other bytes than the files hold")
            del first, expected
            results = alternate(
                {
                    "torchcache, flight lane": lambda: sum(len(view) for view in pool.read(extents)),
                    "bare, a batch an extent": lambda: take(client, b"one"),
                    "bare, batches of views": lambda: take(client, b"views"),
                },
                rounds=rounds,
            )
    return Comparison(shape.name, *results.values())
