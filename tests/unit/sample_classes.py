"""Classes that stored samples are made of, in the tests of the typed encoding."""

from __future__ import annotations

import enum
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Pair = namedtuple("Pair", ["left", "right"])


class Box(NamedTuple):
    x: Any
    label: Any = None


@dataclass
class Point:
    x: Any
    tags: Any = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    value: Any

    def __post_init__(self) -> None:
        if isinstance(self.value, str) and self.value == "refused":
            raise AssertionError("reading a sample must not run its code")


@dataclass
class Derived:
    x: int

    def __post_init__(self) -> None:
        self.twice = 2 * self.x


@dataclass
class Content(dict[str, int]):
    x: int


class Colour(enum.Enum):
    RED = 1


class Outer:
    @dataclass
    class Inner:
        x: Any


class TupleChild(tuple[int, ...]):
    pass


class Overlong(Pair):
    def __new__(cls, *values: Any) -> Overlong:
        return tuple.__new__(cls, values)
