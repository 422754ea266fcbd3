"""A small mutator of our own: for where Atheris isn't, and for a taste of each target in every run of the tests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

ODD: Final = tuple(
    value.to_bytes(width, "little", signed=value < 0)
    for width in (1, 2, 4, 8)
    for value in (0, 1, -1, (1 << 8 * width - 1) - 1, -(1 << 8 * width - 1))
)
"""Numbers at the ends of their kinds."""


def mutated(seeds: Sequence[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """`count` inputs made of `seeds`: bits flipped, bytes cut, doubled, put in and exchanged, a few times each."""
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            _change(data, seeds, chance)
        yield bytes(data)


def _change(data: bytearray, seeds: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.choice((1, 2, 4, 8, 64)))
    match chance.randrange(6):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            del data[at:end]
        case 2:
            data[at:at] = data[at:end]
        case 3:
            odd = chance.choice(ODD)
            data[at : at + len(odd)] = odd
        case 4:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))
        case _:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at:end] = other[start : start + end - at]
