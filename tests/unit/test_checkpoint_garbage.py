"""Python's garbage collector waits while plans are made, and never for longer."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from torchcache.checkpoint.garbage import Truce, garbage_waits


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


def test_blocks_nest_and_an_error_ends_them() -> None:
    with pytest.raises(KeyError), garbage_waits():
        with garbage_waits():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_who_has_no_collector_gets_none() -> None:
    gc.disable()
    with garbage_waits():
        pass
    assert not gc.isenabled()


def test_blocks_of_threads_overlap() -> None:
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with garbage_waits():
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=other)
    with garbage_waits():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    over.set()
    thread.join()
    assert gc.isenabled()


def test_a_truce_ends_when_it_is_told_to() -> None:
    truce = Truce(600)
    assert not gc.isenabled()
    truce.end()
    truce.end()
    assert gc.isenabled()
    truce._timer.join(60)
    assert not truce._timer.is_alive()


def test_a_truce_ends_by_itself() -> None:
    truce = Truce(0.001)
    truce._timer.join(60)
    assert gc.isenabled()
    truce.end()
    assert gc.isenabled()


def test_a_truce_ends_with_what_was_made_in_it() -> None:
    class Made:
        pass

    made = Made()
    truce = Truce(600)
    truce.end_with(made)
    assert not gc.isenabled()
    del made
    assert gc.isenabled()
    truce._timer.join(60)
    assert not truce._timer.is_alive()


def test_a_truce_ends_once() -> None:
    first, second = Truce(600), Truce(600)
    first._end()
    first.end()
    assert not gc.isenabled()
    second.end()
    assert gc.isenabled()


@pytest.mark.forks
def test_a_block_that_a_child_leaves_is_over_already() -> None:
    block = garbage_waits()
    block.__enter__()
    child = os.fork()
    if not child:
        block.__exit__(None, None, None)
        with garbage_waits():
            waits = not gc.isenabled()
        os._exit(0 if waits and gc.isenabled() else 1)
    block.__exit__(None, None, None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_collects() -> None:
    with garbage_waits():
        child = os.fork()
        if not child:
            os._exit(0 if gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
