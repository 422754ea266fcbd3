"""Fills waiting for a thread and for room: first come, first served, with a bound on the bytes in memory.

Who reads comes before who fetches ahead of use. The latter get half of what may run at most, and only when no reader
waits; what isn't even of the epoch that runs is fetched while no reader waits for storage at all.

A fill's bytes count from the moment it starts until its data lies in the store, or, if the store had no room, until
the last reader has let go of it. Waiting fills cost nothing, so `submit` never blocks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import pyarrow as pa

from torchcache.errors import ConfigurationError, Overloaded, ServerUnavailable, TorchCacheError
from torchcache_server.store import StoredChunk

_CLOSE_S = 5.0

LARGE_FILLS: Final = 16
SMALL_FILLS_BYTES: Final = 64 << 20
"""More than LARGE_FILLS run only while they have so many bytes together: an answer takes storage tens of milliseconds,
which many small ones have to share; a few large ones take the whole line as it is."""

SMALL_AHEAD_BYTES: Final = 8 << 20
"""The same of what is fetched ahead of use, half as many: what a reader waits for shares the line with it."""

QUIET_S: Final = 0.1
"""How long no reader must have waited for storage before what will be read in a later epoch is fetched."""

LOOK_AGAIN_S: Final = 0.5
"""How long a fill that waits for room goes without looking for it."""

Need: TypeAlias = Literal["now", "soon", "later"]
"""A reader waits; it will be read in the epoch that runs; in another one."""


class Loan:
    """Bytes of the queue's bound that a running fill holds. `release` may be called twice."""

    def __init__(self, queue: FillQueue, bytes: int) -> None:
        self._finalizer = weakref.finalize(self, queue._give_back, bytes)
        self._finalizer.atexit = False

    def release(self) -> None:
        self._finalizer()

    def tie_to(self, data: bytearray) -> pa.Buffer:
        """`data` as a buffer. The loan runs until the last view of it is gone; don't release it before."""
        buffer = pa.py_buffer(data)
        return pa.foreign_buffer(buffer.address, buffer.size, base=(self, buffer))


@dataclass(eq=False, slots=True)
class Fill:
    """One fill: queued, then running. `deadline` (time.monotonic()) is the latest of those who wait for it.

    What is logged of it is said in the `context` of who asked first.
    """

    name: str
    bytes: int
    work: Callable[[Fill, Loan, float], StoredChunk]
    deadline: float
    future: Future[StoredChunk] = field(default_factory=Future)
    need: Need = "now"
    running: bool = False
    context: Context = field(default_factory=copy_context)


class FillQueue:
    """Runs fills on up to `threads` threads, `limit_bytes` at a time. Thread-safe; threads start as they are needed."""

    def __init__(self, *, threads: int, limit_bytes: int) -> None:
        if threads < 1 or limit_bytes < 1:
            raise ConfigurationError(f"fills need threads and bytes, not {threads} and {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._lent_bytes = 0
        self._waiting: dict[Need, deque[Fill]] = {"now": deque(), "soon": deque(), "later": deque()}
        self._running: Counter[Need] = Counter()
        self._running_bytes: Counter[Need] = Counter()
        self._quiet_from = float("-inf")
        # A loan may be returned by the garbage collector, even on a thread that holds the lock: hence a lock that lets
        # it in, and returns that are only noted down, to be counted by whoever lends.
        self._returned: deque[int] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._thread_count = threads
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self.refused = 0
        """Fills whose turn didn't come in time."""

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of running fills, and of passed-through data that is still read."""
        with self._changed:
            self._settle()
            return self._lent_bytes

    @property
    def running_bytes(self) -> int:
        """Bytes of the fills that run."""
        return self._running_bytes.total()

    @property
    def waiting(self) -> int:
        """Fills that wait for a thread, or for room."""
        return sum(map(len, self._waiting.values()))

    def submit(self, fill: Fill) -> None:
        """Queues `fill`. Its future gets the result of its `work`, or Overloaded if its turn doesn't come.

        Raises ServerUnavailable after `close`, and if there is no thread for it and none can be started.
        """
        fill.future.set_running_or_notify_cancel()  # Shared by its waiters: none of them may cancel it.
        thread: threading.Thread | None = None
        with self._changed:
            if self._closed:
                raise ServerUnavailable("the server is stopping")
            self._waiting[fill.need].append(fill)
            if self.waiting > self._idle and len(self._threads) < self._thread_count:
                name = f"fill-{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.append(thread)
            self._changed.notify()
        if thread is not None:
            self._start(thread, fill)

    def extend(self, fill: Fill, deadline: float) -> None:
        """A reader waits for a fill now. One that hasn't started waits until `deadline`, if its own is sooner."""
        with self._changed:
            fill.deadline = max(fill.deadline, deadline)
            before, fill.need = fill.need, "now"
            if before == "now":
                return
            if fill in self._waiting[before]:
                self._waiting[before].remove(fill)
                self._waiting["now"].append(fill)
                self._changed.notify()
            elif fill.running:  # else it is just being told that its turn didn't come
                self._count(fill, before, -1)
                self._count(fill, "now", 1)

    def close(self) -> None:
        """Fails the fills that wait, and gives the running ones a moment to end. May be called twice."""
        with self._changed:
            self._closed = True
            dropped = [fill for queue in self._waiting.values() for fill in queue]
            for queue in self._waiting.values():
                queue.clear()
            self._changed.notify_all()
        for fill in dropped:
            fill.future.set_exception(ServerUnavailable("the server is stopping", object=fill.name))
        until = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            if thread.ident is not None:  # one that isn't started yet ends as soon as it is
                thread.join(max(0.0, until - time.monotonic()))

    def _start(self, thread: threading.Thread, fill: Fill) -> None:
        """Starts it, without the lock: a collection in the new thread, for which `start` waits, may return loans."""
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more
            with self._changed:
                self._threads.remove(thread)
                if self._threads:
                    return
                with suppress(ValueError):
                    self._waiting[fill.need].remove(fill)
            raise ServerUnavailable(f"no thread can be started to fetch {fill.name}: {error}") from error

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            fill, loan = taken
            if loan is None:
                fill.future.set_exception(self._overloaded(fill))
            else:
                _run(fill, loan)
                self._ended(fill)
            # Not to hold the result, and with it the loan, until the next fill comes.
            del taken, fill, loan

    def _take(self) -> tuple[Fill, Loan | None] | None:
        """The first fill in the queue, with a loan once there is room, without once it is too late; None if closed."""
        with self._changed:
            while not self._closed:
                self._settle()
                queue = next(filter(None, self._waiting.values()), self._waiting["now"])
                now = time.monotonic()
                if queue and queue[0].deadline <= now:
                    self.refused += 1
                    return queue.popleft(), None
                pause_s = self._pause_s(queue[0], now) if queue else None
                if pause_s == 0:
                    fill = queue.popleft()
                    self._lent_bytes += fill.bytes
                    fill.running = True
                    self._count(fill, fill.need, 1)
                    if self.waiting:
                        self._changed.notify()  # There may be room for the next one too.
                    return fill, Loan(self, fill.bytes)
                self._idle += 1
                # What a collection on this very thread gives back between the count above and here wakes nobody.
                self._changed.wait(None if pause_s is None else min(pause_s, LOOK_AGAIN_S))
                self._idle -= 1
            return None

    def _pause_s(self, fill: Fill, now: float) -> float:
        """0 if the fill may start, else how long to wait at most before looking again."""
        until_late_s = max(0.001, fill.deadline - now)
        if not self._has_room(fill) or self._running.total() >= self._at_once(fill):
            return until_late_s
        if fill.need == "now":
            return 0
        if self._running["soon"] + self._running["later"] >= self._ahead_at_once(fill):
            return until_late_s
        if fill.need == "soon":
            return 0
        if self._running["now"]:
            return until_late_s
        return max(0.0, min(until_late_s, self._quiet_from + QUIET_S - now))

    def _ended(self, fill: Fill) -> None:
        with self._changed:
            fill.running = False
            self._count(fill, fill.need, -1)
            if fill.need == "now":
                self._quiet_from = time.monotonic()
            # Wakes nobody: the thread that was at it looks for the next fill itself.

    def _count(self, fill: Fill, need: Need, number: int) -> None:
        self._running[need] += number
        self._running_bytes[need] += number * fill.bytes

    def _at_once(self, fill: Fill) -> int:
        """How many fills may run with this one."""
        small = self._running_bytes.total() + fill.bytes <= SMALL_FILLS_BYTES
        return self._thread_count if small else min(self._thread_count, LARGE_FILLS)

    def _ahead_at_once(self, fill: Fill) -> int:
        """How many of those that are ahead of use."""
        ahead_bytes = self._running_bytes["soon"] + self._running_bytes["later"]
        small = ahead_bytes + fill.bytes <= SMALL_AHEAD_BYTES
        return max(1, (self._thread_count if small else min(self._thread_count, LARGE_FILLS)) // 2)

    def _has_room(self, fill: Fill) -> bool:
        """A fill that is larger than the bound runs alone."""
        return not self._lent_bytes or self._lent_bytes + fill.bytes <= self._limit_bytes

    def _overloaded(self, fill: Fill) -> Overloaded:
        return Overloaded(
            f"{fill.name} waited up to its deadline for other fills to end: {self._limit_bytes} bytes and "
            f"{self._thread_count} fills at a time are the server's bounds; ask for less at a time",
            object=fill.name,
        )

    def _settle(self) -> None:
        while self._returned:
            self._lent_bytes -= self._returned.popleft()

    def _give_back(self, bytes: int) -> None:
        self._returned.append(bytes)
        with self._changed:
            self._changed.notify()


def _run(fill: Fill, loan: Loan) -> None:
    try:
        result = fill.context.run(fill.work, fill, loan, fill.deadline)
    except BaseException as error:  # noqa: BLE001 - it is the waiters' to see
        if isinstance(error, TorchCacheError):
            _forget_calls(error)
        loan.release()
        fill.future.set_exception(error)
    else:
        fill.future.set_result(result)


def _forget_calls(error: BaseException | None) -> None:
    """Drops the tracebacks, and with them what the calls that failed had in hand: it isn't counted any more.

    The future has the error, and the error's traceback a frame that has the future: a ring that only a collection of
    the oldest generation finds, buffers and all. What our own errors say tells enough; others keep their traceback.
    """
    forgotten: set[int] = set()
    while error is not None and id(error) not in forgotten:  # a chain of causes may end in a ring
        forgotten.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
