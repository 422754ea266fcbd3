"""Errors of a user's own code say of which sample they are, and stay what they are.

The name is a note of the exception, whose type and arguments are untouched: `except` clauses work as ever. Notes stand
in tracebacks, and the text of one is what a DataLoader's worker sends home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final

_LISTED: Final = 8
"""Of samples that were asked for together."""


def say_which(error: Exception, name: Callable[[], str]) -> None:
    """Notes in `error` that it was raised for `name()`, unless it says so itself."""
    with suppress(Exception):  # whatever the error's class makes of a note, the error is what matters
        called = name()
        if not any(called in said for said in (str(error), *getattr(error, "__notes__", ()))):
            error.add_note(f"torchcache: raised for {called}")


def each(make: Callable[[Any], Any], items: Sequence[Any], name: Callable[[int], str]) -> list[Any]:
    """`make` of each of `items`; what it raises says for which: `name` gets its place among them."""
    made: list[Any] = []
    try:
        for item in items:
            made.append(make(item))
    except Exception as error:
        say_which(error, lambda: name(len(made)))
        raise
    return made


def named(samples: Iterator[Any], name: Callable[[int], str]) -> Iterator[Any]:
    """`samples`; what their iterator raises says for which: `name` gets its number, from 0."""
    for number in count():
        try:
            sample = next(samples)
        except StopIteration:
            return
        except Exception as error:
            say_which(error, lambda: name(number))  # noqa: B023 - it is called at once
            raise
        yield sample


def numbered(index: int, name: str) -> str:
    """What sample `index` is called where its name alone doesn't say the index."""
    number = f"sample {index}"
    return name if name.startswith(f"{number} ") else f"{number}, {name}"


def together(indices: Sequence[int]) -> str:
    """What samples that were asked for by one call are called."""
    if len(indices) == 1:
        return f"sample {indices[0]}"
    more = f" and {len(indices) - _LISTED} more" if len(indices) > _LISTED else ""
    return f"one of samples {', '.join(map(str, indices[:_LISTED]))}{more}"
