"""What it costs that every byte of a warm read is verified: the flight lane with and without, in the same run.

There is no switch for it in the product: here the one method that compares checksums is replaced, for every other
read. What else a read checks (that pieces follow one another, that sizes fit) stays.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torchcache as tc
from benchmarks.flight_lane import SHAPES, TINY, Shape
from benchmarks.rounds import Result, alternate
from torchcache.model import Extent
from torchcache.wire.codec import Piece


@dataclass(frozen=True)
class Cost:
    shape: str
    verified: Result
    unverified: Result

    @property
    def share(self) -> float:
        """Of the throughput without, what is lost with; 0.1 is a tenth."""
        return 1 - self.unverified.median_s / self.verified.median_s


@contextmanager
def nothing_verified() -> Iterator[None]:
    """Reads of this process take every piece as it comes."""
    real = Piece.verify
    Piece.verify = lambda _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Piece.verify = real  # type: ignore[method-assign]


def cost_of_verification(shape: Shape, *, rounds: int) -> Cost:
    """`Pool.read` of all objects in one call, in random order, from a server that holds them."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        source = Path(folder, "source")
        source.mkdir()
        for i in range(shape.count):
            (source / f"{i:05d}").write_bytes(random.Random(i).randbytes(shape.size))
        with tc.LocalPool(Path(folder, "pool"), capacity="2GB") as pool:
            objects = list(pool.list(f"file://{source}"))
            extents = [Extent(o) for o in random.Random(1).sample(objects, shape.count)]

            def verified() -> int:
                return sum(len(view) for view in pool.read(extents))

            def unverified() -> int:
                with nothing_verified():
                    return verified()

            results = alternate({"verified": verified, "not verified": unverified}, rounds=rounds)
    return Cost(shape.name, *results.values())


def costs(*, rounds: int, tiny: bool = False) -> list[Cost]:
    """Of many small objects, and of a large one."""
    return [cost_of_verification(shape, rounds=rounds) for shape in (TINY if tiny else SHAPES)]
