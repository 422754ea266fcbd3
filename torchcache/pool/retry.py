"""When to try again: only transient errors, with growing pauses, never beyond the deadline, within a budget."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torchcache.errors import Overloaded, TorchCacheError, TransientError

_MOST_OWED: Final = 4
"""In buckets."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """At most `attempts` tries; pauses double from `first_s` to `most_s`, each shortened at random by up to half.

    Together about four seconds: a server that restarts is waited for.
    """

    attempts: int = 8
    first_s: float = 0.05
    most_s: float = 2.0

    def pause_s(self, tries: int, chance: float) -> float:
        """The pause after `tries` failed tries; `chance` in [0, 1) is the jitter."""
        return min(self.most_s, self.first_s * 2.0 ** min(tries - 1, 30)) * (1.0 - chance / 2)


class Budget:
    """Keeps what is asked again from multiplying an outage: a bucket of tokens, at most `most`, full at first.

    Each thing asked for earns a part of one. Thread-safe.
    """

    def __init__(self, most: float, earned: float) -> None:
        self._most = most
        self._earned = earned
        self._left = most
        self._lock = threading.Lock()

    def earn(self, count: int = 1) -> None:
        """So many were asked for."""
        with self._lock:
            self._left = min(self._most, self._left + count * self._earned)

    def spend(self, count: int = 1) -> bool:
        """Whether so many may be asked for again, which takes them. The bucket may owe some afterwards.

        Of one large call it owes no more than four buckets: what is earned must be able to pay that before long.
        """
        with self._lock:
            if self._left < 1:
                return False
            self._left = max(self._left - count, -_MOST_OWED * self._most)
            return True


class HedgeBudget(Budget):
    """What may be asked of two servers: of what is read `share`, as long as that helps.

    Where all servers wait for the same, for their share of a processor or for the network, a second is no faster than
    the first, and what it does for nothing makes all of them later. So each hedge that came too late halves what is
    earned, down to a quarter, with which it is tried now and then; one that helped doubles it again. Not less: after a
    late call of some hundred extents no second would be tried for a hundred thousand, long after things have changed.
    """

    def __init__(self, most: float, share: float) -> None:
        super().__init__(most, share)
        self._share = share

    def helped(self) -> None:
        """The second was faster, or the first failed."""
        with self._lock:
            self._earned = min(self._share, 2 * self._earned)

    def in_vain(self) -> None:
        """The first was faster after all."""
        with self._lock:
            self._earned = max(self._share / 4, self._earned / 2)


def retry_budget() -> Budget:
    """Of a pool in one process: a tenth of its calls may be retries."""
    return Budget(64, 0.1)


def hedge_budget() -> HedgeBudget:
    """Of a pool in one process: a twentieth of the extents it reads may be asked for twice.

    A call of more extents than the bucket can owe, 256, counts as one of so many.
    """
    return HedgeBudget(64, 0.05)


class Retry:
    """The tries of one call. `again` pauses and says whether to make another.

    A server that says it is overloaded is alive, and its turn for us will come: only the deadline ends that wait. It is
    not asked again before the time that it names.
    `refused`: the budget was spent.
    """

    def __init__(
        self,
        budget: Budget,
        deadline: float,
        *,
        policy: RetryPolicy = RetryPolicy(),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._budget = budget
        self._deadline = deadline
        self._policy = policy
        self._sleep = sleep
        self._clock = clock
        self._chance = chance
        self._tries = 0
        self._failed = 0  # of them those that met more than a busy server
        self.refused = False

    def again(self, error: TorchCacheError) -> bool:
        """After a try that failed with `error`. False: raise it."""
        self._tries += 1
        if not isinstance(error, TransientError):
            return False
        chance = self._chance()
        pause = self._policy.pause_s(self._tries, chance)
        if isinstance(error, Overloaded) and error.retry_after_s is not None:
            # Never before the server says, and not all who were told the same at the same moment.
            pause = max(pause, error.retry_after_s * (1.0 + chance / 2))
        if self._clock() + pause >= self._deadline:
            return False
        if not isinstance(error, Overloaded):
            self._failed += 1
            if self._failed >= self._policy.attempts:
                return False
            if not self._budget.spend():
                self.refused = True
                return False
        self._sleep(pause)
        return True
