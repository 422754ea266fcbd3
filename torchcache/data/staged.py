"""What a stage comes to: all is in the pool, or what isn't, whose part that is, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torchcache.errors import TorchCacheError
from torchcache.model import ObjectInfo
from torchcache.pool import Residency

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
    """What the pool held when a stage ended. `missing` names the first `MAX_LISTED` of `missing_count` objects."""

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
            return f"all {held.objects:,} samples are in the pool"
        return f"{held.resident_objects:,} of {held.objects:,} are in the pool. Missing are {self.reasons()}"


class MissingList:
    """Collects what can't be staged, each object once."""

    def __init__(self, uri: Callable[[ObjectInfo], str]) -> None:
        self._uri = uri
        self._found: dict[str, NotStaged] = {}
        self.count = 0

    def add(self, info: ObjectInfo, error: TorchCacheError) -> None:
        """Takes one in."""
        uri = self._uri(info)
        if uri not in self._found:
            self.count += 1
            if len(self._found) < MAX_LISTED:
                self._found[uri] = NotStaged(uri=uri, server=error.server, error=error)

    def report(self, residency: Residency) -> StageReport:
        """The report, with what was collected."""
        return StageReport(residency=residency, missing=tuple(self._found.values()), missing_count=self.count)
