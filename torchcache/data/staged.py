"""Staging all of a dataset, and what it comes to: all is in the pool, or what isn't, whose part that is, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from torchcache.data.progress import progress_bar
from torchcache.data.samples import OnMissing, OnProgress
from torchcache.errors import OutOfSpace, TorchCacheError
from torchcache.model import ObjectInfo
from torchcache.pool import Pool, Residency

_log = logging.getLogger("torchcache")

MAX_LISTED: Final = 10_000
"""Objects that a report names; more are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotStaged:
    """An object that isn't wholly in the pool: its URI, the server that should hold it, if known, and why not."""

    uri: str
    server: str | None
    error: TorchCacheError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What the pool held when a stage ended. `missing` names the first `MAX_LISTED` of `missing_count` objects.

    First come those that couldn't be staged, with what they failed with; then those that had to go again.
    """

    residency: Residency
    missing: tuple[NotStaged, ...] = ()
    missing_count: int = 0

    @property
    def complete(self) -> bool:
        """Whether every byte is there."""
        return not self.missing_count and self.residency.resident_objects == self.residency.objects

    def reasons(self) -> str:
        """How many are missing, by server and reason, the most frequent first."""
        found = Counter((one.server or "no server", one.error.message) for one in self.missing)
        parts = [f"{count:,} at {server}: {why}" for (server, why), count in found.most_common(5)]
        more = ["..."] if len(found) > len(parts) or self.missing_count > len(self.missing) else []
        return "; ".join([*parts, *more])

    def __str__(self) -> str:
        held = self.residency
        if self.complete:
            return f"all {held.objects:,} are in the pool"
        return f"{held.resident_objects:,} of {held.objects:,} are in the pool. Missing are {self.reasons()}"


class MissingList:
    """Collects what can't be staged, and then what the pool doesn't hold: each object once, in memory for `MAX_LISTED`.

    Beyond those that are listed, what couldn't be staged is counted when the pool turns out not to hold it. Of an empty
    object it holds all there is, so that one counts at once.
    """

    def __init__(self, uri: Callable[[ObjectInfo], str]) -> None:
        self._uri = uri
        self._found: dict[str, NotStaged] = {}
        self._others = 0  # that count, and aren't listed

    def add_failed(self, info: ObjectInfo, error: TorchCacheError) -> None:
        """Takes in what couldn't be staged; a large object may come several times."""
        if not self._is_listed(info, error):
            self._others += not info.size

    def add_absent(self, info: ObjectInfo, error: TorchCacheError) -> None:
        """Takes in what the pool doesn't hold, once all has been staged: each once."""
        if not self._is_listed(info, error):
            self._others += 1

    def _is_listed(self, info: ObjectInfo, error: TorchCacheError) -> bool:
        """Lists it if there is room."""
        uri = self._uri(info)
        if uri not in self._found:
            if len(self._found) >= MAX_LISTED:
                return False
            self._found[uri] = NotStaged(uri=uri, server=error.server, error=error)
        return True

    def report(self, residency: Residency) -> StageReport:
        """The report, with what was collected."""
        found = tuple(self._found.values())
        return StageReport(residency=residency, missing=found, missing_count=len(found) + self._others)


class Stageable(Protocol):
    """A dataset's objects, or computed samples."""

    @property
    def total_bytes(self) -> int | None:
        """Of all; None if not known beforehand."""

    def residency(self) -> Residency:
        """How much the pool holds now."""

    def absent(self) -> Iterator[tuple[ObjectInfo, TorchCacheError]]:
        """What the pool doesn't hold now, and why."""


def stage_all(
    pool: Pool,
    parts: Stageable,
    stage: Callable[[OnProgress, OnMissing], None],
    *,
    count: int,
    noun: str,
    progress: bool,
    on_missing: Literal["raise", "report"],
) -> StageReport:
    """Runs `stage`, shows its progress, and then asks the pool what it holds. Raises as `CachedDataset.stage` says."""
    missing = MissingList(lambda info: pool.uri(info.id))
    with ExitStack() as closing:
        advance: OnProgress = lambda *_: None  # noqa: E731
        if progress:
            advance = closing.enter_context(
                progress_bar(f"stage {count:,} {noun}", count, parts.total_bytes, noun)
            )
        stage(advance, missing.add_failed)
    residency = parts.residency()
    if residency.resident_objects < residency.objects:
        for info, error in parts.absent():
            missing.add_absent(info, error)
    report = missing.report(residency)
    if not report.complete and on_missing == "raise":
        _log.warning("stage: %s", report)
        if report.missing:
            raise report.missing[0].error
        raise OutOfSpace(f"stage: {report}")
    return report
