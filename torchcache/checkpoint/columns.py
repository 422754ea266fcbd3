"""Checks of whole columns of untrusted JSON: what a value at a time costs microseconds costs nearly nothing this way.

Each returns the column, or raises ValueError naming what shouldn't be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar, cast

_T = TypeVar("_T")

COUNT_LIMIT = 1 << 62


def require(condition: bool, problem: str) -> None:
    """Raises ValueError, with the problem, unless the condition holds."""
    if not condition:
        raise ValueError(problem)


def rows(values: Any, width: int) -> list[tuple[Any, ...]]:
    """The columns of a list of rows, which all have `width` values; all columns are empty if there are none."""
    _require_types([values], list, "a list of rows")
    _require_types(values, list, "a row")
    require(set(map(len, values)) <= {width}, f"a row hasn't {width} values")
    return list(zip(*values, strict=True)) or [()] * width


def texts(values: Sequence[Any]) -> Sequence[str]:
    _require_types(values, str, "a text")
    return values


def counts(values: Sequence[Any]) -> Sequence[int]:
    """Whole numbers from 0 on, which fit 64 bits with room to add some."""
    _require_types(values, int, "a count")  # bool is another type
    if values:
        least, most = min(values), max(values)
        require(
            least >= 0 and most < COUNT_LIMIT, f"{least if least < 0 else most} stands where a count should"
        )
    return values


def lists_of_counts(values: Sequence[Any]) -> Sequence[list[int]]:
    _require_types(values, list, "a list of counts")
    counts(list(chain.from_iterable(values)))
    return values


def present(values: Sequence[_T | None]) -> list[_T]:
    """Those that aren't None."""
    return [value for value in values if value is not None]


def _require_types(values: Sequence[Any], kind: type, what: str) -> None:
    if not set(map(type, values)) <= {kind}:
        wrong = next(value for value in values if type(value) is not kind)
        raise ValueError(f"{wrong!r:.100} stands where {what} should")


def as_tuples(values: Sequence[list[int] | None]) -> list[tuple[int, ...] | None]:
    """Lists as tuples; None stays."""
    return [None if value is None else tuple(value) for value in cast("Sequence[Any]", values)]
