"""What a server needs done while nobody asks for it.

The store is tidied every second, and scrubbed at a set rate; once nothing runs any more, freed memory is given back.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from torchcache.heap import give_back_freed_memory
from torchcache_server.cache.work_queue import retry_delay_s
from torchcache_server.store import ScrubStep

_log = logging.getLogger(__name__)

TIDY_S: Final = 1.0
SCRUB_S: Final = 0.125
"""Between two steps of the scrub: short, so that each holds the disk only briefly."""

ROUND_S: Final = 3600.0
"""A round of the scrub begins no sooner after the one before: a small store need not be read without end."""

BUSY_SHARE: Final = 0.125
"""Of the scrub's rate while streams run. Not none: a server that is never idle has its disk verified too."""

QUIET_S: Final = 10.0
"""With nothing done for so long, freed memory is given back: who comes next has to wait for new pages, for once."""

LONGEST_PAUSE_S: Final = 60.0
CLOSE_S: Final = 10.0


class Tended(Protocol):
    """What of the store is called here."""

    def tidy(self) -> object:
        """Drops what is past its time, compacts segments that are mostly dead, keeps some of the disk free."""

    def scrub(self, max_bytes: int) -> ScrubStep:
        """Verifies about the next `max_bytes` of payloads."""


class Chore:
    """Something done again and again, later after each failure in a row. Not thread-safe."""

    def __init__(self, name: str, work: Callable[[float], float]) -> None:
        self._name = name
        self._work = work
        self._failures = 0
        self.due_s = 0.0

    def run(self, now: float) -> None:
        """Does it. `work` gets the time and returns in how many seconds it is due again."""
        try:
            pause_s = self._work(now)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other chores and the server go on
            self._failures += 1
            pause_s = retry_delay_s(self._failures, first_s=TIDY_S, longest_s=LONGEST_PAUSE_S)
            # The trace once: while a disk is broken the same would fill the log.
            _log.warning(
                "%s failed (%d in a row), again in %.0f s: %s: %s",
                *(self._name, self._failures, pause_s, type(error).__name__, error),
                exc_info=self._failures == 1,
            )
        else:
            self._failures = 0
        self.due_s = now + pause_s


def give_back_memory() -> None:
    """That of garbage too, which Python looks for the less often the more there is that isn't."""
    gc.collect()
    give_back_freed_memory()


class Rest:
    """Gives memory back once what the server does has ended, and `done`, which counts it, has stood for `QUIET_S`."""

    def __init__(
        self,
        *,
        busy: Callable[[], bool],
        done: Callable[[], int],
        give_back: Callable[[], None] = give_back_memory,
    ) -> None:
        self._busy = busy
        self._done = done
        self._give_back = give_back
        self._seen = done()
        self._quiet_from: float | None = None  # None: nothing was done since memory was given back

    def look(self, now: float) -> float:
        """Returns in how many seconds to look again."""
        done = self._done()
        if done != self._seen or self._busy():
            self._seen, self._quiet_from = done, now
        elif self._quiet_from is not None and now - self._quiet_from >= QUIET_S:
            self._quiet_from = None
            self._give_back()
        return TIDY_S


class Chores:
    """When what is due. Not thread-safe; `now` is time.monotonic(), or a test's."""

    def __init__(
        self,
        store: Tended,
        *,
        scrub_bytes_s: int,
        busy: Callable[[], bool],
        now: float,
        rest: Rest | None = None,
    ) -> None:
        self._store = store
        self._rate = scrub_bytes_s
        self._busy = busy
        self._allowed = 0.0  # bytes that the rate allows now; below zero after a step that took more
        self._allowed_at = now
        self._round_began = now
        self._chores = [Chore("tidying the store", self._tidy)]
        if scrub_bytes_s:
            self._chores.append(Chore("the scrub", self._scrub))
        if rest is not None:
            self._chores.append(Chore("giving memory back", rest.look))

    def step(self, now: float) -> float:
        """Does what is due, and returns in how many seconds something is again."""
        for chore in self._chores:
            if chore.due_s <= now:
                chore.run(now)
        return max(0.0, min(chore.due_s for chore in self._chores) - now)

    def _tidy(self, _now: float) -> float:
        self._store.tidy()
        return TIDY_S

    def _scrub(self, now: float) -> float:
        rate = self._rate * (BUSY_SHARE if self._busy() else 1.0)
        # What wasn't used while nothing was due isn't saved up beyond this: the rate would be none.
        most = max(1.0, rate * 2 * SCRUB_S)
        self._allowed = min(self._allowed + rate * (now - self._allowed_at), most)
        self._allowed_at = now
        if self._allowed < 1:
            return SCRUB_S
        step = self._store.scrub(int(self._allowed))
        self._allowed -= step.bytes
        if step.damaged:
            names = ", ".join(sorted(set(step.damaged)))
            _log.warning("the scrub found %d damaged chunks, of %s", len(step.damaged), names)
        if not step.finished:
            return SCRUB_S
        self._round_began = max(now + SCRUB_S, self._round_began + ROUND_S)
        return self._round_began - now


class Maintenance:
    """The thread that does the chores of one server, from construction until `close`."""

    def __init__(
        self, store: Tended, *, scrub_bytes_s: int, busy: Callable[[], bool], rest: Rest | None = None
    ) -> None:
        """`scrub_bytes_s` 0 runs no scrub. `busy` says whether the server has others to serve now."""
        self._chores = Chores(store, scrub_bytes_s=scrub_bytes_s, busy=busy, now=time.monotonic(), rest=rest)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Begins nothing more, and waits for what runs; idempotent."""
        self._closed.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            pause_s = self._chores.step(time.monotonic())
