"""What it costs that every byte of a warm read is verified: a lane with and without, in the same run.

There is no switch for it in the product: here the functions that compare checksums are replaced, for every other
read. What else a read checks (that pieces follow one another, that sizes fit) stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest.mock import patch

from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Shape, all_of, ground, objects_shape, reader, records_shape
from benchmarks.rounds import Result, alternate
from torchcache.lanes import assembly
from torchcache.lanes.copying import copy
from torchcache.wire.codec import Piece

A_TENTH: Final = Goal(bound=0.9)


@contextmanager
def nothing_verified() -> Iterator[None]:
    """Reads of this process take every piece as it comes."""
    with (
        patch.object(assembly, "is_intact", lambda *_: True),
        patch.object(assembly, "is_copied_intact", _copied),
        patch.object(Piece, "verify", lambda _: None),
    ):
        yield


def _copied(_: Piece, source: memoryview, target: memoryview) -> bool:
    copy(source, target)
    return True


def measure(scale: Scale) -> Findings:
    """On the flight lane: many small records, and large ones."""
    shapes = (records_shape(scale), objects_shape(scale))
    found = {shape.name: _with_and_without(shape, scale.rounds) for shape in shapes}
    rows = [_row(shape, *found[shape.name]) for shape in shapes]
    return Findings(title="Verification of every byte, flight lane", rows=rows, contenders=found)


def _with_and_without(shape: Shape, rounds: int) -> list[Result]:
    with ground(shape, lane="flight") as found:
        verified = all_of(shape, reader(found, "numpy"))

        def unverified() -> int:
            with nothing_verified():
                return verified()

        contenders = {"torchcache, verified": verified, "not verified": unverified}
        return list(alternate(contenders, rounds=rounds).values())


def _row(shape: Shape, verified: Result, unverified: Result) -> Row:
    return Row(
        what=f"{shape.name}, verified",
        unit="us each",
        ours=us_each(verified, shape.count),
        bare=us_each(unverified, shape.count),
        against="not verified",
        goal=A_TENTH,
    )
