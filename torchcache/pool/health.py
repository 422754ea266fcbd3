"""How the servers of a pool do, as one process sees them: who is asked last, who is tried, when to ask twice. Pure.

A server is *out* for one of three reasons: it can't be reached, it gives no sign of life, or it takes ten times as
long as the others do for like sizes, or so long that others answer first who were asked later. Who is out is asked
after all others; reads try it now and then (a *probe*, beside them, with pauses that grow), and one good answer brings
it back. Who can be reached is only put out as long as no more than half are: where most are slow, it is the network, or
we ourselves.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

PAUSE_S: Final = 2.0
"""How long a server that is out is left alone, at first; twice as long after each probe that fails, up to `MOST_S`."""

MOST_S: Final = 32.0

KEPT: Final = 64
"""Times that are remembered of a server, for each class of sizes."""

ENOUGH: Final = 8
"""Times from which on they tell something."""

HEDGE_TIMES: Final = 2
"""How often the 95th percentile of its times a call takes before another server is asked too.

One in twenty is beyond the percentile itself, most of them hardly, and the other server, which has to fetch what isn't
its own, is no faster then. Short of processor time all servers lose by it, and so all of them are late.
"""

LATE_TIMES: Final = 10
"""How often the others' median a late answer takes."""

BEATEN_TIMES: Final = HEDGE_TIMES + 1
"""And how often it has taken when another answers first that was asked later: what it would have taken nobody knows.

The other is asked after twice the 95th percentile, so where reads take 12 ms or more, that answer is there before ten
times their median, however slow the first is.
"""

LATE_LEAST_S: Final = 0.03
"""What takes less is never late: a scheduler's mood."""

LATE_IN_A_ROW: Final = 4
"""So many late answers put a server out, each to a call that began after the one before was known to be late: a hiccup
delays all calls that are under way.
"""

HEDGE_LEAST_S: Final = 0.1
UNKNOWN_S: Final = 2.0
"""When to ask the next server too, where nobody's times are known."""

SILENT_S: Final = 1.5
"""How long there may be no sign of life at least. Servers at work give one every second, and say so first."""

_CLASSES: Final = 16
"""Of sizes: less than 64 KiB, twice as much, and so on."""

Reason = Literal["unreachable", "silent", "slow"]

_WORDS: Final[dict[Reason, str]] = {
    "unreachable": "it can't be reached",
    "silent": "it gives no sign of life",
    "slow": "it takes {times} times as long as the others",
}


@dataclass(slots=True)
class _Server:
    """What is known of one. `out` is empty while it is in."""

    times: dict[int, deque[float]] = field(default_factory=dict)
    late: int = 0
    late_at: float = float("-inf")
    out: Reason | Literal[""] = ""
    words: str = ""
    out_at: float = 0.0
    until: float = 0.0
    pause_s: float = 0.0
    back_at: float = float("-inf")
    probing: bool = False


class Health:
    """Thread-safe. Sizes are payload in bytes, with a little for each extent; they are told apart by powers of two.

    `changed` is called with a server's id and why it is out, or nothing if it is back.
    """

    def __init__(
        self,
        changed: Callable[[str, str], object] = lambda server, words: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._changed = changed
        self._clock = clock
        self._chance = chance
        self._lock = threading.RLock()
        self._servers: dict[str, _Server] = {}
        self.anyone_out = False

    def members(self, servers: Iterable[str]) -> None:
        """Who is in the pool. What is known of others is forgotten."""
        with self._lock:
            self._servers = {server: self._of(server) for server in servers}
            self._count()

    # ---- what was seen ----

    def answered(self, server: str, read_at: float = float("-inf")) -> None:
        """It can be reached: read from, by a call that began at `read_at`, or asked, at another of its ports.

        That tells something of what happened before. An answer at the other port tells it only once the server may be
        tried, and nobody does. Who was slow or silent has to prove more.
        """
        if not self.anyone_out:
            return
        with self._lock:
            known = self._of(server)
            if known.out == "unreachable" and (read_at > known.out_at or server in self.due()):
                self._back(server)

    def failed(self, server: str) -> None:
        """It can't be reached."""
        with self._lock:
            if not self._of(server).out:
                self._put_out(server, "unreachable")

    def timed(self, server: str, size: int, began: float) -> None:
        """It has answered a call of `size` that began at `began`, without waiting for an under-store."""
        with self._lock:
            took_s = self._clock() - began
            self._judge(server, size, began, took_s)
            self._of(server).times.setdefault(_class(size), deque(maxlen=KEPT)).append(took_s)

    def beaten(self, server: str, size: int, began: float) -> None:
        """Another was faster: it takes longer than until now."""
        with self._lock:
            self._judge(server, size, began, self._clock() - began, beaten=True)

    def silent(self, server: str) -> bool:
        """It gave no sign of life for `silence_s`. Whether it is out now."""
        with self._lock:
            if not self._of(server).out and self._may_leave():
                self._put_out(server, "silent")
            return bool(self._of(server).out)

    # ---- what to do ----

    def is_out(self, server: str) -> bool:
        """Whether all others are asked first."""
        return self.anyone_out and server in self._servers and bool(self._servers[server].out)

    def hedge_s(self, server: str, size: int) -> float:
        """How long an answer is waited for alone: by the 95th percentile of its own of like size, else of all."""
        with self._lock:
            own = self._of(server).times.get(_class(size), ())
            known = own if len(own) >= ENOUGH else [*own, *self._others(server, size)]
            if len(known) < ENOUGH:
                return UNKNOWN_S
            times: list[float] = sorted(known)
            return max(HEDGE_LEAST_S, HEDGE_TIMES * times[len(times) * 95 // 100])

    def silence_s(self, server: str, size: int) -> float:
        """How long it may give no sign of life."""
        return max(SILENT_S, 2 * self.hedge_s(server, size))

    def due(self) -> list[str]:
        """Who is out and may be tried."""
        now = self._clock()
        with self._lock:
            return [
                server
                for server, known in self._servers.items()
                if known.out and not known.probing and now >= known.until
            ]

    def take_probe(self, server: str) -> bool:
        """Whether it is time to try one that is out; then the caller does, and says `probed`."""
        with self._lock:
            if server not in self.due():
                return False
            self._of(server).probing = True
            return True

    def probed(self, server: str, size: int, took_s: float | None) -> None:
        """How long the probe took; None: it failed."""
        with self._lock:
            known = self._of(server)
            known.probing = False
            if not known.out:
                return
            if took_s is not None and took_s < self._probe_limit_s(server, size):
                self._back(server)
            else:
                self._leave_alone(known, 2 * known.pause_s)

    def reasons(self) -> tuple[tuple[str, Reason], ...]:
        """Each server that is out, and the word for why."""
        if not self.anyone_out:
            return ()
        with self._lock:
            return tuple((server, known.out) for server, known in self._servers.items() if known.out)

    def out(self) -> dict[str, str]:
        """Why, for each server that is out."""
        with self._lock:
            return {server: known.words for server, known in self._servers.items() if known.out}

    # ---- how that is found ----

    def _of(self, server: str) -> _Server:
        return self._servers.setdefault(server, _Server())

    def _others(self, server: str, size: int) -> list[float]:
        """Times of like sizes of the others that are in."""
        found: list[float] = []
        for other, known in self._servers.items():
            if other != server and not known.out:
                found += known.times.get(_class(size), ())
        return found

    def _slowness(self, server: str, size: int, took_s: float) -> float:
        """How often the others' median that is; 0 if there is nothing to compare it with."""
        others = self._others(server, size)
        return took_s / max(_median(others), 1e-6) if len(others) >= ENOUGH else 0.0

    def _probe_limit_s(self, server: str, size: int) -> float:
        """What a probe may take. It may bring less than reads do: then it is compared with the next larger."""
        for larger in range(_CLASSES - _class(size)):
            others = self._others(server, size << larger)
            if len(others) >= ENOUGH:
                return max(LATE_LEAST_S, LATE_TIMES * _median(others))
        return UNKNOWN_S

    def _judge(self, server: str, size: int, began: float, took_s: float, *, beaten: bool = False) -> None:
        known = self._of(server)
        if known.out:
            return
        times = self._slowness(server, size, took_s) if took_s >= LATE_LEAST_S else 0.0
        if times < (BEATEN_TIMES if beaten else LATE_TIMES):
            known.late = 0
        elif began >= known.late_at:
            known.late += 1
            known.late_at = self._clock()
            if known.late >= LATE_IN_A_ROW and self._may_leave():
                self._put_out(server, "slow", f"more than {times:.0f}" if beaten else f"{times:.0f}")

    def _may_leave(self) -> bool:
        return 2 * (1 + sum(bool(known.out) for known in self._servers.values())) <= len(self._servers)

    def _put_out(self, server: str, reason: Reason, times: str = "") -> None:
        known = self._of(server)
        soon = self._clock() - known.back_at < MOST_S
        known.out_at = self._clock()
        known.out, known.words = reason, _WORDS[reason].format(times=times)
        known.times.clear()
        known.late = 0
        self._leave_alone(known, 2 * known.pause_s if soon else PAUSE_S)
        self._count()
        self._changed(server, known.words)

    def _leave_alone(self, known: _Server, pause_s: float) -> None:
        """Each client for another while: not all of them are to come back at once."""
        known.pause_s = min(pause_s, MOST_S)
        known.until = self._clock() + known.pause_s * (0.75 + self._chance() / 2)

    def _back(self, server: str) -> None:
        known = self._of(server)
        known.out = ""
        known.back_at = self._clock()
        self._count()
        self._changed(server, "")

    def _count(self) -> None:
        self.anyone_out = any(known.out for known in self._servers.values())


def far_slower(times_s: Mapping[str, float]) -> dict[str, float]:
    """Of these times for the same, by server, those that are late, as multiples of the others' median."""
    found = {}
    for server, took_s in times_s.items():
        others = [other_s for other, other_s in times_s.items() if other != server]
        if others and took_s >= max(LATE_LEAST_S, LATE_TIMES * _median(others)):
            found[server] = took_s / _median(others)
    return found


def _class(size: int) -> int:
    return min((size >> 16).bit_length(), _CLASSES - 1)


def _median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]
