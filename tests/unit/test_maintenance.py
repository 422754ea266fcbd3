"""The chores of a store: when they are done, how fast, and that no error ends them. By a clock of the test's own."""

from __future__ import annotations

import logging
import threading

import pytest
from torchcache_server.cache.maintenance import (
    BUSY_SHARE,
    LONGEST_PAUSE_S,
    QUIET_S,
    ROUND_S,
    SCRUB_S,
    Chores,
    Maintenance,
    Rest,
)
from torchcache_server.store import ScrubStep

MIB = 1024 * 1024


class Scripted:
    """A store of chunks that are all `chunk_bytes` long: a step takes whole ones, at least one."""

    def __init__(self, *, chunk_bytes: int = 4 * MIB, chunks: int = 1 << 40) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks = chunks
        self.left = chunks
        self.scrubbed = 0
        self.asked: list[int] = []
        self.rounds = 0
        self.damaged: tuple[str, ...] = ()
        self.tidied = 0
        self.tidying: Exception | None = None
        self.scrubbing: Exception | None = None
        self.changed = threading.Condition()

    def tidy(self) -> None:
        with self.changed:
            self.tidied += 1
            self.changed.notify_all()
        if self.tidying:
            raise self.tidying

    def scrub(self, max_bytes: int) -> ScrubStep:
        self.asked.append(max_bytes)
        if self.scrubbing:
            raise self.scrubbing
        taken = min(self.left, max(1, max_bytes // self.chunk_bytes))
        self.left -= taken
        self.scrubbed += taken * self.chunk_bytes
        finished = not self.left
        if finished:
            self.left = self.chunks
            self.rounds += 1
        return ScrubStep(taken * self.chunk_bytes, taken, self.damaged, finished)


class Time:
    """Runs chores as the thread does, over time that is only counted."""

    def __init__(self, store: Scripted, *, rate: int = 32 * MIB) -> None:
        self.now = 1000.0
        self.busy = False
        self.chores = Chores(store, scrub_bytes_s=rate, busy=lambda: self.busy, now=self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (next_s := self.now + self.chores.step(self.now)) <= end:
            assert next_s > self.now, "it would spin"
            self.now = next_s
        self.now = end


@pytest.mark.parametrize("rate", [1, 100_000, MIB, 32 * MIB, 100 * MIB, 1 << 36])
@pytest.mark.parametrize("chunk_bytes", [1000, 4 * MIB])
def test_the_scrub_keeps_its_rate(rate: int, chunk_bytes: int) -> None:
    store = Scripted(chunk_bytes=chunk_bytes)
    Time(store, rate=rate).run(100)
    assert rate * 100 * 0.9 - chunk_bytes * 800 <= store.scrubbed <= rate * 100 + chunk_bytes
    assert max(store.asked) <= rate * SCRUB_S * 2 + 1


def test_the_scrub_makes_up_for_chunks_larger_than_a_step() -> None:
    """1 MiB/s over chunks of 4 MiB: one every four seconds."""
    store = Scripted()
    Time(store, rate=MIB).run(400)
    assert store.scrubbed == pytest.approx(400 * MIB, rel=0.05)


def test_the_scrub_yields_to_streams_but_goes_on() -> None:
    store = Scripted(chunk_bytes=MIB)
    time = Time(store)
    time.busy = True
    time.run(100)
    assert store.scrubbed == pytest.approx(100 * 32 * MIB * BUSY_SHARE, rel=0.05)


def test_a_rate_of_nothing_is_no_scrub() -> None:
    store = Scripted()
    Time(store, rate=0).run(100)
    assert (store.asked, store.tidied) == ([], 101)


def test_the_store_is_tidied_every_second_scrub_or_not() -> None:
    store = Scripted()
    Time(store).run(100)
    assert store.tidied == 101


def test_damage_is_told_by_the_dataset(caplog: pytest.LogCaptureFixture) -> None:
    """F5."""
    store = Scripted(chunks=1)
    store.damaged = ("s3://b/y", "s3://b/x", "s3://b/y")
    Time(store).run(1)
    assert [r.getMessage() for r in caplog.records] == [
        "the scrub found 3 damaged chunks, of s3://b/x, s3://b/y"
    ]


def test_a_round_of_a_small_store_is_not_begun_again_at_once() -> None:
    store = Scripted(chunks=10)
    time = Time(store)
    time.run(ROUND_S - 1)
    assert store.rounds == 1
    time.run(ROUND_S)
    assert store.rounds == 2
    assert store.scrubbed == 20 * store.chunk_bytes


def test_a_round_longer_than_the_pause_is_followed_at_once() -> None:
    chunks = int(2 * ROUND_S * 32 / 4)
    store = Scripted(chunks=chunks)
    Time(store).run(4.2 * ROUND_S)
    assert (store.rounds, store.left < chunks) == (2, True)


def test_time_that_was_lost_is_not_made_up_for() -> None:
    """A machine that slept, or a tidying that took minutes: no burst follows."""
    store = Scripted(chunk_bytes=1000)
    time = Time(store)
    time.run(10)
    before = store.scrubbed
    time.now += 600
    time.run(1)
    assert store.scrubbed - before <= 32 * MIB * 1.5


def test_errors_are_logged_and_tried_again_ever_later(caplog: pytest.LogCaptureFixture) -> None:
    """F12, F15: a disk that fails keeps neither the other chore nor, once it is well, the same one from going on."""
    store = Scripted()
    time = Time(store)
    store.scrubbing = OSError("broken")
    with caplog.at_level(logging.WARNING):
        time.run(600)
    assert store.tidied == 601, "the other chore is not kept up"
    assert 600 / LONGEST_PAUSE_S <= len(store.asked) < 30
    assert len(caplog.records) == len(store.asked)
    assert [bool(record.exc_info) for record in caplog.records].count(True) == 1, "one trace"
    assert "the scrub failed (1 in a row)" in caplog.text
    store.scrubbing = None
    time.run(LONGEST_PAUSE_S + 1)
    assert store.scrubbed > 0
    store.tidying = MemoryError()
    before = store.scrubbed
    time.run(600)
    assert store.scrubbed - before == pytest.approx(600 * 32 * MIB, rel=0.05)
    assert store.tidied < 700


def test_memory_is_given_back_once_nothing_runs() -> None:
    """I5: not amid the work, nor again and again after it."""
    time = Time(Scripted(), rate=0)
    done, given_back = 0, []
    rest = Rest(
        busy=lambda: time.busy, done=lambda: done, give_back=lambda: given_back.append(time.now - ended)
    )
    time.chores = Chores(Scripted(), scrub_bytes_s=0, busy=lambda: time.busy, now=time.now, rest=rest)
    ended = time.now
    time.run(10 * QUIET_S)
    assert not given_back, "nothing was done yet"
    for _ in range(100):  # short calls, of which none runs while it is looked
        done += 1
        time.run(QUIET_S / 2)
    time.busy = True  # one long one, that is counted when it ends
    time.run(10 * QUIET_S)
    assert not given_back
    time.busy, ended = False, time.now
    done += 1
    time.run(100 * QUIET_S)
    assert given_back == [pytest.approx(QUIET_S, abs=2)]
    done, ended = done + 1, time.now
    time.run(100 * QUIET_S)
    assert len(given_back) == 2


def test_the_thread_works_and_ends() -> None:
    """I5."""
    store = Scripted()
    store.tidying = RuntimeError("not even this ends it")
    maintenance = Maintenance(store, scrub_bytes_s=1 << 40, busy=lambda: False)
    with store.changed:
        assert store.changed.wait_for(lambda: store.tidied >= 2, 30)
    maintenance.close()
    maintenance.close()
    assert not maintenance._thread.is_alive()
    assert store.asked, "nor the other chore"


def test_close_waits_for_what_runs() -> None:
    """The store is closed behind it: nothing may still be in it."""
    entered, release = threading.Event(), threading.Event()

    class Slow(Scripted):
        def tidy(self) -> None:
            entered.set()
            assert release.wait(60)
            super().tidy()

    store = Slow()
    maintenance = Maintenance(store, scrub_bytes_s=0, busy=lambda: False)
    assert entered.wait(60)
    closing = threading.Thread(target=maintenance.close)
    closing.start()
    assert maintenance._closed.wait(60)
    closing.join(0.2)
    assert closing.is_alive()
    release.set()
    closing.join(60)
    assert not closing.is_alive()
    assert store.tidied == 1
