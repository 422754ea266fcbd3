"""`torchcache status --watch`: what happened between two looks at the pool's servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep, strftime
from typing import TYPE_CHECKING

from torchcache.errors import TransientError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from torchcache.cli.output import Output
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


Seen = Mapping[str, tuple["ServerStatus", float]]
"""By instance: how a server was when it was last seen, and when that was, monotonic."""


def rates(seen: Seen, after: Sequence[ServerStatus], now: float) -> list[Rates]:
    """Of each server in `after`, since it was seen. One that wasn't yet, or has started anew since, counts from its
    start; if that was before the last look, what it has done a second on the average.
    """
    looked = max(at for _, at in seen.values())
    found = []
    for server in after:
        before, since = seen.get(server.instance, (None, min(looked, now - server.uptime_s)))
        found.append(_rates(before, server, now - since))
    return found


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
    output: Output,
    look: Callable[[], list[ServerStatus]],
    show: Callable[[list[ServerStatus], list[Rates]], None],
    every_s: float,
) -> None:
    """Shows what `look` finds every `every_s` seconds, until interrupted. A pool that is away is waited for."""
    seen: dict[str, tuple[ServerStatus, float]] = {}
    with _display(output) as display:
        while True:
            try:
                found, now = look(), monotonic()
                with display.look(len(found)):
                    show(found, rates(seen, found, now) if seen else [])
                seen |= {server.instance: (server, now) for server in found}
            except TransientError as error:
                display.away(error)
            sleep(every_s)


class Pages:
    """Where no terminal is: each look is printed below the one before."""

    def __init__(self, output: Output) -> None:
        self._output = output

    @contextmanager
    def look(self, servers: int) -> Iterator[None]:
        """Around what prints a look, at which so many servers answered."""
        self._output.text(_title(servers))
        yield

    def away(self, error: TransientError) -> None:
        """A look that met an error."""
        self._output.warning(str(error))


class Screen:
    """On a terminal: each look takes the place of the one before. What doesn't fit is cut off at the end, until the
    last one stays.
    """

    def __init__(self, output: Output, live: Live) -> None:
        self._output = output
        self._live = live
        self._shown: list[RenderableType] = []

    @contextmanager
    def look(self, servers: int) -> Iterator[None]:
        """See `Pages`."""
        with self._output.gather() as shown:
            self._output.text(_title(servers))
            yield
        self._shown = shown
        self._update(shown)

    def away(self, error: TransientError) -> None:
        """The error stands above what was seen last."""
        with self._output.gather() as shown:
            self._output.warning(f"{_time_text()}: {error}")
        self._update([*shown, *self._shown])

    def _update(self, shown: Sequence[RenderableType]) -> None:
        from rich.console import Group

        self._live.update(Group(*shown), refresh=True)


@contextmanager
def _display(output: Output) -> Iterator[Pages | Screen]:
    if output.as_json or not sys.stdout.isatty():
        yield Pages(output)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        yield Screen(output, live)


def _title(servers: int) -> str:
    return f"{_time_text()}: {servers} {'server answers' if servers == 1 else 'servers answer'}"


def _time_text() -> str:
    return strftime("%H:%M:%S")
