"""`torchcache status --watch`: what happened between two looks at the pool's servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

import click

from torchcache.errors import TransientError

if TYPE_CHECKING:
    from torchcache.pool import ServerStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a server did in a while, a second. `hit_rate` is None if nothing was looked up.

    `hedged_calls` are reads that it was asked for because another server was late.
    """

    address: str
    flight_bytes: float
    local_bytes: float
    hit_rate: float | None
    from_storage_bytes: float
    to_storage_bytes: float
    requests: float
    evicted_chunks: float
    hedged_calls: float


def rates(before: Sequence[ServerStatus], after: Sequence[ServerStatus], seconds: float) -> list[Rates]:
    """Of each server in `after`. One that was not there before, or has started anew since, counts from its start."""
    known = {server.instance: server for server in before}
    return [_rates(known.get(server.instance), server, seconds) for server in after]


def _rates(before: ServerStatus | None, after: ServerStatus, seconds: float) -> Rates:
    def grew(count: Callable[[ServerStatus], int]) -> int:
        return count(after) - (count(before) if before is not None else 0)

    hits, misses = grew(lambda s: s.hits), grew(lambda s: s.misses)
    return Rates(
        address=after.address,
        flight_bytes=grew(lambda s: s.served_bytes) / seconds,
        local_bytes=grew(lambda s: s.local_bytes) / seconds,
        hit_rate=hits / (hits + misses) if hits + misses else None,
        from_storage_bytes=grew(lambda s: sum(u.read_bytes for u in s.under_stores)) / seconds,
        to_storage_bytes=grew(lambda s: sum(u.write_bytes for u in s.under_stores)) / seconds,
        requests=grew(
            lambda s: sum(u.read_requests + u.write_requests + u.meta_requests for u in s.under_stores)
        )
        / seconds,
        evicted_chunks=grew(lambda s: s.evicted_chunks) / seconds,
        hedged_calls=grew(lambda s: s.hedged_calls) / seconds,
    )


def watch(
    look: Callable[[], list[ServerStatus]],
    show: Callable[[list[ServerStatus], list[Rates]], None],
    every_s: float,
) -> None:
    """Shows what `look` finds every `every_s` seconds, until interrupted. A pool that is away is waited for."""
    before: list[ServerStatus] = []
    looked = monotonic()
    while True:
        try:
            found = look()
        except TransientError as error:
            click.echo(f"torchcache: {error}", err=True)
        else:
            now = monotonic()
            if sys.stdout.isatty():
                click.clear()
            show(found, rates(before, found, now - looked) if before else [])
            before, looked = found, now
        sleep(every_s)
