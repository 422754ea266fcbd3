"""What the log says of requests: which one a line is about, how one that failed ended, and what took long.

The request that a thread serves is in a context variable: whatever is logged meanwhile, down to the fetches from
under-stores that it causes, is said to be about it by the log's formatter (process/logs.py). A line a call at most,
and none where it went well, unless somebody debugs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from torchcache.errors import (
    CheckpointError,
    ConfigurationError,
    NotCommitted,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    Overloaded,
    TorchCacheError,
)

DEFAULT_SLOW_S: Final = 10.0
"""What takes longer is logged. A read lasts until its client has taken it, so a busy one takes its time."""

BURST: Final = 100
LINES_S: Final = 2.0
"""Lines about requests that failed: so many at once, and so many a second. Nonsense shall not fill a disk."""

MAX_NAMESPACE_CHARACTERS: Final = 300

_LOG = logging.getLogger("torchcache_server.requests")
_T = TypeVar("_T")

_ORDINARY: Final = (NotResident, NotCommitted, Overloaded)
"""How clients find out what is there; or counted in the metrics."""

_THE_CALLERS: Final = (ConfigurationError, ObjectNotFound, ObjectChanged, CheckpointError)


@dataclass(slots=True)
class Request:
    """What is known of a request while it is served: its id, its method, who asks (as gRPC says it), and for what."""

    id: str
    call: str
    peer: str
    namespace: str = ""

    def is_about(self, namespace: str) -> None:
        """A dataset, a save or a URI: what its lines are filtered by."""
        self.namespace = namespace[:MAX_NAMESPACE_CHARACTERS]


current: Final[ContextVar[Request | None]] = ContextVar("request", default=None)


@contextmanager
def serving(request: Request) -> Iterator[None]:
    """Around what one thread does for a request."""
    token = current.set(request)
    try:
        yield
    finally:
        current.reset(token)


def served_stepwise(request: Request, steps: Generator[_T, None, None]) -> Iterator[_T]:
    """The `steps` of a stream for a request, each in its context: Arrow takes them in one that is new every time."""
    context = copy_context()
    context.run(current.set, request)
    try:
        while True:
            try:
                step = context.run(next, steps)
            except StopIteration:
                return
            yield step
    finally:
        context.run(steps.close)


class Throttle:
    """At most `burst` at once, and `rate_s` a second. Thread-safe."""

    def __init__(
        self, burst: int = BURST, rate_s: float = LINES_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._rate_s = rate_s
        self._clock = clock
        self._left = float(burst)
        self._at = clock()
        self._held_back = 0
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """How many were held back since the last that passed; None: this one is, too."""
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._at) * self._rate_s)
            self._at = now
            if self._left < 1:
                self._held_back += 1
                return None
            self._left -= 1
            held_back, self._held_back = self._held_back, 0
            return held_back


class RequestLog:
    """Says how requests ended. Thread-safe; all of it is said of the request that the thread serves."""

    def __init__(self, *, slow_s: float = DEFAULT_SLOW_S, throttle: Throttle | None = None) -> None:
        self._slow_s = slow_s
        self._failures = throttle or Throttle()
        self._refusals = Throttle()

    def failed(self, call: str, error: TorchCacheError, what: str = "") -> None:
        """A call, or `what` of it, ended with `error`."""
        level = level_of(error)
        if _LOG.isEnabledFor(level):
            self._say(self._failures, level, "%s%s failed: %s: %s", call, what, type(error).__name__, error)

    def refused(self, call: str, why: str) -> None:
        """A caller who may not. Said apart: a stranger must not keep the others' failures out of the log."""
        self._say(self._refusals, logging.WARNING, "%s refused: %s", call, why)

    def ended(self, call: str, took_s: float, what: Callable[[], str] = str) -> None:
        """A call ended, well or not; `what` tells more, and is asked only if it is said."""
        level = logging.INFO if took_s >= self._slow_s else logging.DEBUG
        if _LOG.isEnabledFor(level):
            _LOG.log(level, "%s took %.3f s%s", call, took_s, what())

    def _say(self, throttle: Throttle, level: int, text: str, *arguments: Any) -> None:
        held_back = throttle.take() if level > logging.DEBUG else 0
        if held_back is None:
            return
        if held_back:
            text, arguments = text + " (%d such lines before it left out)", (*arguments, held_back)
        _LOG.log(level, text, *arguments)


def level_of(error: TorchCacheError) -> int:
    """DEBUG for what clients live with, INFO for what the caller has to mend, WARNING for what this side has."""
    if isinstance(error, _ORDINARY):
        return logging.DEBUG
    return logging.INFO if isinstance(error, _THE_CALLERS) else logging.WARNING
