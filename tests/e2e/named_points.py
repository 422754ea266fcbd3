"""Named points of a save, at which a child of the tests does something to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Point = tuple[type, str, Literal["before", "behind"]]
"""What is called, of which class, and on which side of it the point is."""


def arm(point: Point, reach: Callable[[], None]) -> None:
    """`reach` is called each time the point is reached, by whichever thread."""
    kind, name, side = point
    original: Callable[..., Any] = getattr(kind, name)

    def armed(*arguments: Any, **named: Any) -> Any:
        if side == "before":
            reach()
        result = original(*arguments, **named)
        if side == "behind":
            reach()
        return result

    setattr(kind, name, armed)
