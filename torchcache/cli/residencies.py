"""`torchcache status --residency`: how much the pool holds of each dataset, of all that storage has there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Final

from torchcache.cli.output import percent_text, size_text
from torchcache.errors import TorchCacheError, TransientError
from torchcache.save_names import KEPT_PREFIXES

if TYPE_CHECKING:
    from torchcache.cli.output import Output
    from torchcache.model import ObjectInfo
    from torchcache.pool import Pool, ServerStatus

ASKED_AT_ONCE: Final = 50_000
"""Objects in one question: what of a listing is kept in memory."""

MOST_DATASETS: Final = 15
"""What `status --watch` shows."""

REST: Final = 20
"""Times as long as it took the answer is good: with --watch a twentieth of the time goes into listing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetResidency:
    """Of one dataset. `error` says why it can't be told; then the rest is 0."""

    name: str
    objects: int = 0
    bytes: int = 0
    resident_bytes: int = 0
    error: str = ""

    @property
    def fraction(self) -> float | None:
        """Resident bytes of all; None if there are none."""
        return self.resident_bytes / self.bytes if self.bytes else None


class Residencies:
    """What `of` finds, kept for a while by how long it took."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._found: list[DatasetResidency] = []
        self._good_until = 0.0

    def of(self, servers: Iterable[ServerStatus]) -> list[DatasetResidency]:
        """Of all datasets that the servers hold something of and that lie in storage, by name: each is listed."""
        began = monotonic()
        if not self._found or began >= self._good_until:
            names = {n.name for server in servers for n in server.namespaces if "://" in n.name}
            self._found = _residencies(self._pool, sorted(names))
            ended = monotonic()
            self._good_until = ended + REST * (ended - began)
        return self._found


def _residencies(pool: Pool, names: Sequence[str]) -> list[DatasetResidency]:
    """Of the datasets at these folders. Once a server didn't answer, the rest isn't asked for: each waits as long."""
    found: list[DatasetResidency] = []
    away = ""
    for name in names:
        try:
            found.append(DatasetResidency(name=name, error=away) if away else _residency(pool, name))
        except TorchCacheError as error:
            away = str(error) if isinstance(error, TransientError) else ""
            found.append(DatasetResidency(name=name, error=str(error)))
    return found


def _residency(pool: Pool, name: str) -> DatasetResidency:
    found = DatasetResidency(name=name)
    listed = iter(pool.list_in_any_order(name))
    while objects := list(islice(listed, ASKED_AT_ONCE)):
        found = _sum(found, objects, pool.resident_bytes(objects))
    return found


def _sum(before: DatasetResidency, objects: Sequence[ObjectInfo], held: Sequence[int]) -> DatasetResidency:
    sizes = [max(0, one.size) for one in objects]
    return replace(
        before,
        objects=before.objects + len(objects),
        bytes=before.bytes + sum(sizes),
        resident_bytes=before.resident_bytes + sum(map(min, sizes, held)),
    )


def show_residencies(output: Output, residencies: Sequence[DatasetResidency]) -> None:
    """A table, if there are any."""
    rows = [
        (
            one.name,
            f"{one.objects:,}",
            size_text(one.bytes),
            size_text(one.resident_bytes),
            one.error or ("-" if one.fraction is None else percent_text(one.fraction)),
        )
        for one in residencies
    ]
    if rows:
        output.table(("dataset in storage", ">objects", ">size", ">in the pool", "of it"), rows)


def show_datasets(
    output: Output, servers: Iterable[ServerStatus], residencies: Sequence[DatasetResidency]
) -> None:
    """A table of the datasets that hold the most, if there are any, with what is known of all that they have."""
    held: dict[str, list[int]] = {}
    for server in servers:
        for one in server.namespaces:
            if not one.name.startswith(KEPT_PREFIXES):
                held.setdefault(one.name, []).append(one.bytes)
    whole = {one.name: one for one in residencies}
    rows = []
    for name, sizes in sorted(held.items(), key=lambda item: (-sum(item[1]), item[0]))[:MOST_DATASETS]:
        of = whole.get(name)
        fraction = of.fraction if of is not None else None
        rows.append(
            (
                name,
                str(len(sizes)),
                size_text(sum(sizes)),
                size_text(of.bytes) if of is not None and not of.error else "-",
                "-" if fraction is None else percent_text(fraction),
                of.error if of is not None else "",
            )
        )
    if rows:
        output.table(("dataset", ">servers", ">in the pool", ">in storage", ">resident", "error"), rows)
    if len(held) > MOST_DATASETS:
        output.text(f"and {len(held) - MOST_DATASETS:,} datasets that hold less")
