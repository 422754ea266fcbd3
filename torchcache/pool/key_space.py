"""Where to cut a range of keys in two without knowing what lies in it. Pure.

A guess may be bad, which costs a question, but never wrong: whatever string cuts a range, each key lies on one side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

_POSITIONS: Final = 64
"""Characters looked at. Keys that are alike for longer aren't cut."""


class KeySpace:
    """Names made of some letters, as numbers: each of a name's first characters is a digit."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names` show which letters there are. Others are taken for the next one."""
        self._letters = sorted(set().union(*names))
        self._base = len(self._letters) + 2

    def number(self, name: str) -> int:
        """Greater for names that sort later, bytewise; nearly: what is made of it has to be compared."""
        value = 0
        for letter in name[:_POSITIONS]:
            value = value * self._base + 1 + bisect_left(self._letters, letter)
        return value * int(self._base ** max(0, _POSITIONS - len(name)))

    @property
    def end(self) -> int:
        """Behind every name."""
        return int(self._base**_POSITIONS)

    def middle(self, low: str, high: str | None) -> str | None:
        """A short string between two names, exclusive of both, about half-way; `high` None is behind every name.

        None if there is none to be found.
        """
        wanted = (self.number(low) + (self.end if high is None else self.number(high))) // 2
        for length in range(1, _POSITIONS + 1):
            name = self._name(wanted, length)
            if name > low and (high is None or name < high):
                return name
        return None

    def _name(self, number: int, length: int) -> str:
        """The first `length` characters of the name that has the number, or comes next to it."""
        letters = []
        for position in range(length):
            digit = number // self._base ** (_POSITIONS - 1 - position) % self._base
            if not digit or not self._letters:
                break
            letters.append(self._letters[min(digit, len(self._letters)) - 1])
        return "".join(letters)
