"""A read that another thread ends: nothing is written into its buffers from then on."""

from __future__ import annotations

import threading

import pytest

from torchcache.lanes.watch import Ended, Watch

PATIENCE_S = 60.0


class Stream:
    def __init__(self) -> None:
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


def test_what_is_ended_writes_nothing_more_and_is_cancelled() -> None:
    watch, stream = Watch(), Stream()
    assert watch.opened(stream)
    with watch.landing(1):
        pass
    watch.end()
    assert stream.cancelled == 1
    with pytest.raises(Ended), watch.landing(1):
        raise AssertionError("it would be written")


def test_what_is_ended_before_it_began_to_come() -> None:
    watch, stream = Watch(), Stream()
    watch.end()
    assert not watch.opened(stream)
    watch.end()
    assert stream.cancelled == 0, "whoever opened it ends it"


def test_no_stream_is_held_once_it_is_closed() -> None:
    watch, stream = Watch(), Stream()
    watch.opened(stream)
    watch.closed()
    watch.end()
    assert stream.cancelled == 0


def test_ending_waits_for_what_is_being_written() -> None:
    watch = Watch()
    writing, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    written: list[str] = []

    def write() -> None:
        with watch.landing(1):
            writing.set()
            go_on.wait(PATIENCE_S)
            written.append("all of it")

    def end() -> None:
        watch.end()
        ended.set()

    writer, ender = threading.Thread(target=write), threading.Thread(target=end)
    writer.start()
    assert writing.wait(PATIENCE_S)
    ender.start()
    assert not ended.wait(0.05)
    go_on.set()
    assert ended.wait(PATIENCE_S)
    assert written
    writer.join()
    ender.join()


def test_signs_of_life() -> None:
    watch = Watch()
    assert watch.asked == watch.last_sign == float("inf")
    watch.asking()
    first = watch.last_sign
    assert (watch.spoke, watch.filling) == (False, False)
    watch.opened(Stream())
    assert (watch.spoke, watch.filling) == (True, False)
    with watch.landing(3):
        pass
    assert not watch.filling
    with watch.landing(0):
        pass
    with watch.landing(3):
        pass
    assert watch.filling, "what is timed must not be what an under-store took"
    assert watch.last_sign >= first
