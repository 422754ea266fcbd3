"""Keys worked on by threads: one thread a key, again when asked."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.work_queue import WorkQueue, retry_delay_s


@given(st.integers(1, 10**6), st.floats(0.0, 1.0, exclude_max=True))
def test_pauses_grow_to_their_bound_and_no_further(failures: int, jitter: float) -> None:
    delay_s = retry_delay_s(failures, first_s=0.5, longest_s=30.0, jitter=jitter)
    whole_s = min(30.0, 0.5 * 2 ** min(failures - 1, 30))
    assert whole_s / 2 <= delay_s <= whole_s
    assert whole_s / 2 <= retry_delay_s(failures, first_s=0.5, longest_s=30.0) <= whole_s


def test_a_key_is_worked_on_by_one_thread_at_a_time_and_again_if_added_meanwhile() -> None:
    inside, rounds = threading.Semaphore(1), []
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work(key: str) -> None:
        assert inside.acquire(blocking=False)
        rounds.append(key)
        begun.set()
        go_on.wait()
        inside.release()
        if len(rounds) == 2:
            done.set()

    queue = WorkQueue(work, threads=4, name="test")
    queue.add("key")
    begun.wait()
    for _ in range(10):
        queue.add("key")
    go_on.set()
    assert done.wait(60)
    queue.close(timeout_s=60)
    assert rounds == ["key", "key"]


def test_a_key_that_asks_for_it_comes_again_and_a_hurry_cuts_the_wait() -> None:
    times, again = [], threading.Event()

    def work(key: str) -> float | None:
        times.append(key)
        again.set()
        return 3600.0 if len(times) < 3 else None

    queue = WorkQueue(work, threads=1, name="test")
    queue.add("key", after_s=3600.0)
    for number in range(1, 4):
        while len(times) < number:
            queue.hurry()
            again.wait(0.01)
            again.clear()
    queue.close(timeout_s=60)
    assert times == ["key"] * 3


def test_one_key_that_fails_or_waits_holds_up_no_other() -> None:
    done: list[str] = []
    all_done = threading.Event()

    def work(key: str) -> None:
        if key == "bad":
            raise RuntimeError("a bug")
        done.append(key)
        if len(done) == 5:
            all_done.set()

    queue = WorkQueue(work, threads=1, name="test")
    queue.add("later", after_s=3600.0)
    for key in ("bad", "a", "b", "c", "d", "e"):
        queue.add(key)
    assert all_done.wait(60)
    queue.close(timeout_s=60)
    assert sorted(done) == ["a", "b", "c", "d", "e"]
