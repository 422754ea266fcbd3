"""When to try an under-store again: backoff with full jitter, a number of tries, a budget, and the caller's deadline.

(M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015; the budget is that of botocore's standard
mode: retries are paid from a bucket that only successes refill, so that an outage isn't met by a storm of them.)
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torchcache.errors import DeadlineExceeded, IntegrityError, Overloaded, TorchCacheError, TransientError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """`tries` in all; the n-th pause is random in [0, min(longest_s, first * 2**n)), `first` by the kind of failure."""

    tries: int = 6
    first_s: float = 0.1
    first_overloaded_s: float = 0.5
    longest_s: float = 5.0

    def longest_pause_s(self, failures: int, *, overloaded: bool) -> float:
        """Upper bound of the pause after `failures` failures (from 1)."""
        first_s = self.first_overloaded_s if overloaded else self.first_s
        return float(min(self.longest_s, first_s * 2 ** (failures - 1)))


class RetryBudget:
    """At most `tokens` retries in stock; a success gives back a tenth of one. Thread-safe.

    By default twice as many as fills run at a time: when all connections break at once, each has its retry.
    """

    def __init__(self, tokens: int = 256) -> None:
        self._limit_tenths = self._tenths = 10 * tokens
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self._tenths < 10:
                return False
            self._tenths -= 10
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._tenths = min(self._limit_tenths, self._tenths + 1)


class Retrier:
    """Runs attempts against one under-store. `on_retry` is called before each try but the first."""

    def __init__(
        self,
        *,
        policy: RetryPolicy | None = None,
        budget: RetryBudget | None = None,
        on_retry: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._budget = budget or RetryBudget()
        self._on_retry = on_retry
        self._sleep = sleep

    def run(self, attempt: Callable[[], T], *, uri: str, deadline: float, tries: int | None = None) -> T:
        """The result of `attempt`, tried again after a TransientError or IntegrityError while there is time.

        At most `tries` times in all, if that is fewer than the policy's.
        Raises the last attempt's error, or DeadlineExceeded once `deadline` (time.monotonic()) would pass first.
        """
        most = self._policy.tries if tries is None else min(tries, self._policy.tries)
        failures = 0
        last: TorchCacheError | None = None
        while True:
            if time.monotonic() >= deadline:
                raise _too_late(uri, failures, last) from last
            try:
                result = attempt()
            except (TransientError, IntegrityError) as error:
                last = error
            else:
                self._budget.succeeded()
                return result
            failures += 1
            if failures >= most or not self._budget.take():
                if failures == 1:
                    raise last  # and not `from` itself
                raise last.saying(f"{last.message}; {failures} tries failed") from last
            pause_s = self._pause_s(failures, last)
            if time.monotonic() + pause_s >= deadline:
                raise _too_late(uri, failures, last) from last
            self._sleep(pause_s)
            self._on_retry()

    def _pause_s(self, failures: int, error: TorchCacheError) -> float:
        longest_s = self._policy.longest_pause_s(failures, overloaded=isinstance(error, Overloaded))
        return random.uniform(0, longest_s)  # noqa: S311 - spreads load, guards nothing


def _too_late(uri: str, failures: int, last: TorchCacheError | None) -> DeadlineExceeded:
    why = (
        f" after {failures} failed tries, the last: {last.message}"
        if last
        else " before it could be asked for"
    )
    return DeadlineExceeded(f"the deadline for {uri} passed{why}", object=uri)
