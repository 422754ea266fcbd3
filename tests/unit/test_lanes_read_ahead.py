"""read_ahead.py: everything comes, in order, errors too, and nothing is left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from torchcache.lanes.read_ahead import ReadAhead


def threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_all_items_come_in_order() -> None:
    ahead = ReadAhead(range(1000))
    assert list(ahead) == list(range(1000))
    ahead.close()
    assert threads() == 0


def test_the_sources_error_comes_behind_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = ReadAhead(source())
    taken = []
    with pytest.raises(ValueError, match="broken") as caught:
        for item in ahead:
            taken.append(item)
    assert taken == [1]
    names = {entry.name for entry in caught.traceback}
    assert "source" not in names, "a frame would keep the source alive"
    ahead.close()
    assert threads() == 0


def test_it_runs_ahead_but_not_far() -> None:
    taken = 0
    full = threading.Event()

    def source() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken += 1
            if taken == 5:
                full.set()
            yield item

    ahead = ReadAhead(source(), depth=4)
    assert full.wait(10)  # four lie in the queue, one in the thread's hand
    ahead.close()
    assert taken <= 10
    assert threads() == 0


def test_closing_in_the_middle_ends_the_thread() -> None:
    ahead = ReadAhead(range(10_000))
    assert next(iter(ahead)) == 0
    ahead.close()
    assert threads() == 0
