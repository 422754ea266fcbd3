from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from torchcache_server.cache.fill_queue import (
    LARGE_FILLS,
    SMALL_AHEAD_BYTES,
    SMALL_FILLS_BYTES,
    Fill,
    FillQueue,
    Loan,
    Need,
)
from torchcache_server.store import StoredChunk

from tests.waiting import until
from torchcache.errors import ConfigurationError, Overloaded, ServerUnavailable


@contextmanager
def queue_of(threads: int, limit_bytes: int) -> Iterator[FillQueue]:
    with closing(FillQueue(threads=threads, limit_bytes=limit_bytes)) as queue:
        yield queue


class Held:
    """A fill that runs until it is let go. `passes_through`: its result keeps the loan."""

    def __init__(self, size: int = 1, *, passes_through: bool = False, timeout_s: float = 30.0) -> None:
        self.started = started = threading.Event()
        self.go = go = threading.Event()

        # Not a method: the result would be part of a cycle, and stay until a collection that no thread disturbs.
        def work(fill: Fill, loan: Loan, deadline: float) -> StoredChunk:
            started.set()
            assert go.wait(30)
            if passes_through:
                return StoredChunk.of(loan.tie_to(bytearray(size)), size)
            loan.release()
            return StoredChunk.of(bytes(size), size)

        self.fill = Fill("it", size, work, time.monotonic() + timeout_s)


def test_bounds_the_bytes_of_running_fills() -> None:
    with queue_of(threads=4, limit_bytes=10) as queue:
        first, second, third = Held(6), Held(4), Held(1)
        for held in (first, second, third):
            queue.submit(held.fill)
        assert first.started.wait(30)
        assert second.started.wait(30)
        assert queue.in_flight_bytes == 10
        assert not third.started.is_set()
        assert queue.waiting == 1
        second.go.set()
        assert third.started.wait(30)
        for held in (first, third):
            held.go.set()
            held.fill.future.result(30)
        assert queue.in_flight_bytes == 0


def test_tells_the_bytes_of_running_fills_alone() -> None:
    with queue_of(threads=2, limit_bytes=10) as queue:
        passed, other = Held(6, passes_through=True), Held(4)
        for held in (passed, other):
            queue.submit(held.fill)
            assert held.started.wait(30)
        assert queue.running_bytes == 10
        for held in (passed, other):
            held.go.set()
            held.fill.future.result(30)
        until(lambda: queue.running_bytes == 0)  # its thread comes to that after the result
        assert queue.in_flight_bytes == 6  # what was passed through is still held


def assert_runs_at_once(count: int, size: int, need: Need) -> None:
    """Of more fills than may run on 24 threads, so many do, and no more."""
    with queue_of(threads=24, limit_bytes=100 * SMALL_FILLS_BYTES) as queue:
        fills = [Held(size) for _ in range(30)]

        def running() -> int:
            return sum(held.started.is_set() for held in fills)

        for held in fills:
            held.fill.need = need
            queue.submit(held.fill)
        until(lambda: running() == count)
        time.sleep(0.05)
        assert running() == count
        for held in fills:
            held.go.set()
        for held in fills:
            held.fill.future.result(30)


def test_many_small_fills_run_at_once_and_few_large_ones() -> None:
    assert_runs_at_once(24, SMALL_FILLS_BYTES // 64, "now")
    assert_runs_at_once(LARGE_FILLS, SMALL_FILLS_BYTES // LARGE_FILLS + 1, "now")


def test_of_what_is_ahead_half_as_many_run_and_of_large_ones_half_of_few() -> None:
    assert_runs_at_once(12, 1024, "soon")
    assert_runs_at_once(LARGE_FILLS // 2, SMALL_AHEAD_BYTES // (LARGE_FILLS // 2) + 1, "soon")


def test_threads_start_as_they_are_needed() -> None:
    def threads() -> int:
        return sum(thread.name.startswith("fill-") for thread in threading.enumerate())

    before = threads()
    with queue_of(threads=8, limit_bytes=100) as queue:
        assert threads() == before
        for _ in range(5):
            held = Held()
            held.go.set()
            queue.submit(held.fill)
            held.fill.future.result(30)
            until(lambda: not queue.running_bytes)
        assert 1 <= threads() - before <= 5
        several = [Held() for _ in range(8)]
        for held in several:
            queue.submit(held.fill)
        for held in several:
            assert held.started.wait(30)
            held.go.set()
        assert threads() - before == 8


def test_a_thread_that_starts_may_return_what_was_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection in the new thread, before it says that it runs, finds a loan in a ring of garbage."""
    with queue_of(threads=2, limit_bytes=10) as queue:
        lent = Loan(queue, 0)

        class Starting(threading.Thread):
            def _set_ident(self) -> None:
                super()._set_ident()
                lent.release()

        first, second = Held(), Held()
        queue.submit(first.fill)
        assert first.started.wait(30)
        monkeypatch.setattr(threading, "Thread", Starting)
        submitting = threading.Timer(0.0, queue.submit, (second.fill,))
        submitting.daemon = True
        submitting.start()
        assert second.started.wait(30)
        for held in (first, second):
            held.go.set()


def test_where_no_thread_can_be_started_those_that_are_there_do() -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with queue_of(threads=2, limit_bytes=10) as queue, pytest.MonkeyPatch.context() as patch:
        first, second = Held(), Held()
        first.go.set()
        second.go.set()
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(ServerUnavailable, match="no thread can be started to fetch it"):
            queue.submit(Held().fill)
        assert queue.waiting == 0
        patch.undo()
        queue.submit(first.fill)
        patch.setattr(threading.Thread, "start", no_more)
        queue.submit(second.fill)
        for held in (first, second):
            held.fill.future.result(30)


def test_is_first_come_first_served() -> None:
    """A small fill doesn't overtake a large one for ever."""
    with queue_of(threads=4, limit_bytes=10) as queue:
        first, large, small = Held(5), Held(10), Held(1)
        for held in (first, large, small):
            queue.submit(held.fill)
        assert first.started.wait(30)
        small.go.set()
        first.go.set()
        assert large.started.wait(30)
        assert not small.started.is_set()
        large.go.set()
        assert small.fill.future.result(30).object_size == 1


def test_a_fill_above_the_bound_runs_alone() -> None:
    with queue_of(threads=2, limit_bytes=10) as queue:
        held = Held(11)
        held.go.set()
        queue.submit(held.fill)
        assert held.fill.future.result(30).object_size == 11


def test_bytes_that_pass_through_count_until_their_last_reader_lets_go() -> None:
    with queue_of(threads=2, limit_bytes=10) as queue:
        first, second = Held(10, passes_through=True), Held(1)
        first.go.set()
        second.go.set()
        queue.submit(first.fill)
        view = first.fill.future.result(30).payload.slice(3, 2)
        del first
        queue.submit(second.fill)
        assert queue.in_flight_bytes == 10
        assert not second.started.is_set()
        assert view.to_pybytes() == b"\0\0"
        del view
        assert second.fill.future.result(30).object_size == 1


def test_a_fill_whose_turn_does_not_come_is_overloaded() -> None:
    with queue_of(threads=1, limit_bytes=10) as queue:
        first, late = Held(), Held(timeout_s=0.01)
        queue.submit(first.fill)
        assert first.started.wait(30)
        queue.submit(late.fill)
        time.sleep(0.02)
        first.go.set()
        with pytest.raises(Overloaded, match=r"it waited up to its deadline .* ask for less"):
            late.fill.future.result(30)
        assert not late.started.is_set()


def test_one_that_waits_for_room_is_told_at_its_deadline() -> None:
    with queue_of(threads=2, limit_bytes=1) as queue:
        first, late = Held(), Held(timeout_s=0.05)
        queue.submit(first.fill)
        assert first.started.wait(30)
        queue.submit(late.fill)
        with pytest.raises(Overloaded):
            late.fill.future.result(30)
        first.go.set()


def test_a_waiter_with_more_patience_extends_the_wait() -> None:
    with queue_of(threads=1, limit_bytes=10) as queue:
        first, late = Held(), Held(timeout_s=0.01)
        queue.submit(first.fill)
        assert first.started.wait(30)
        queue.submit(late.fill)
        queue.extend(late.fill, time.monotonic() + 30)
        time.sleep(0.02)
        late.go.set()
        first.go.set()
        assert late.fill.future.result(30).object_size == 1


def test_a_fill_that_fails_returns_its_bytes() -> None:
    def work(fill: Fill, loan: Loan, deadline: float) -> StoredChunk:
        raise KeyError("broken")

    with queue_of(threads=1, limit_bytes=10) as queue:
        fill = Fill("it", 10, work, time.monotonic() + 30)
        queue.submit(fill)
        with pytest.raises(KeyError, match="broken"):
            fill.future.result(30)
        assert queue.in_flight_bytes == 0


class Taken(bytearray):
    """Bytes that can be watched."""


def test_a_fill_that_fails_lets_go_of_what_it_had_read() -> None:
    """I5: what is no longer counted is no longer there, whether or not rings of garbage are looked for."""
    alive: list[weakref.ref[Taken]] = []

    def read(into: Taken) -> None:
        raise OSError("cut off")

    def work(fill: Fill, loan: Loan, deadline: float) -> StoredChunk:
        data = Taken(4096)
        alive.append(weakref.ref(data))
        try:
            read(data)
        except OSError as error:
            raise ServerUnavailable("storage is away") from error
        raise AssertionError

    gc.disable()
    try:
        with queue_of(threads=1, limit_bytes=4096) as queue:
            fill = Fill("it", 4096, work, time.monotonic() + 30)
            queue.submit(fill)
            with pytest.raises(ServerUnavailable):
                fill.future.result(30)
            [data] = alive
            assert data() is None
    finally:
        gc.enable()


def test_a_fill_whose_error_is_its_own_cause_ends_like_any_other() -> None:
    def work(fill: Fill, loan: Loan, deadline: float) -> StoredChunk:
        error = ServerUnavailable("storage is away")
        raise error from error

    with queue_of(threads=1, limit_bytes=10) as queue:
        for _ in range(2):  # by the same thread
            fill = Fill("it", 10, work, time.monotonic() + 30)
            queue.submit(fill)
            with pytest.raises(ServerUnavailable, match="away"):
                fill.future.result(30)


def test_nobody_can_cancel_what_others_wait_for() -> None:
    with queue_of(threads=1, limit_bytes=10) as queue:
        first, second = Held(), Held()
        queue.submit(first.fill)
        queue.submit(second.fill)
        assert not second.fill.future.cancel()
        first.go.set()
        second.go.set()
        assert second.fill.future.result(30).object_size == 1


def test_closing_fails_what_waits_and_ends_what_runs() -> None:
    others = set(threading.enumerate())
    queue = FillQueue(threads=1, limit_bytes=10)
    first, second = Held(), Held()
    queue.submit(first.fill)
    assert first.started.wait(30)
    queue.submit(second.fill)
    first.go.set()
    queue.close()
    assert first.fill.future.result(30).object_size == 1
    ended = second.fill.future.exception(30)
    assert ended is None or isinstance(ended, ServerUnavailable)
    with pytest.raises(ServerUnavailable, match="stopping"):
        queue.submit(Held().fill)
    queue.close()
    threads = set(threading.enumerate()) - others
    assert not [thread for thread in threads if thread.name.startswith("fill-")]


@pytest.mark.parametrize(("threads", "limit_bytes"), [(0, 1), (1, 0)])
def test_refuses_bounds_that_let_nothing_through(threads: int, limit_bytes: int) -> None:
    with pytest.raises(ConfigurationError):
        FillQueue(threads=threads, limit_bytes=limit_bytes)
