"""What a section of the benchmarks found: rows of ours beside the bare limit, each with its goal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.rounds import Result, machine


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`bound` is met by the row's ratio, or by its value itself."""

    bound: float
    of: Literal["ratio", "value"] = "ratio"
    sense: Literal["at least", "at most"] = "at least"

    def reached(self, row: Row) -> bool:
        found = row.ratio if self.of == "ratio" else row.ours
        if found is None:
            return False
        return found >= self.bound if self.sense == "at least" else found <= self.bound


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `ratio` is how much better ours is than `bare`: 1.0 is equal, more is better."""

    what: str
    unit: str
    ours: float
    bare: float | None = None
    against: str = ""
    better: Literal["less", "more"] = "less"
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        if not self.bare or not self.ours:
            return None
        return self.bare / self.ours if self.better == "less" else self.ours / self.bare

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.goal.reached(self)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A section's rows, the contenders behind them, and words on what was measured."""

    title: str
    rows: Sequence[Row]
    contenders: Mapping[str, Sequence[Result]] = field(default_factory=dict)
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self, rounds: int) -> dict[str, Any]:
        """Plain values; where and when it was measured belongs to each section, as they may run apart."""
        return {
            "title": self.title,
            "note": self.note,
            "measured": time.strftime("%Y-%m-%d", time.gmtime()),
            "rounds": rounds,
            "machine": machine(),
            "rows": [{**asdict(row), "ratio": row.ratio, "reached": row.reached} for row in self.rows],
            "contenders": {
                name: [{**asdict(one), "gb_per_s": one.gigabytes_per_s} for one in results]
                for name, results in self.contenders.items()
            },
            "details": dict(self.details),
        }


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a section does. `tiny`: one small round, to see that it runs; its figures mean nothing."""

    rounds: int = 15
    tiny: bool = False


Section = Callable[[Scale], Findings]


def us_each(result: Result, count: int) -> float:
    """Microseconds of each of the `count` records of a round."""
    return result.median_s / count * 1e6
