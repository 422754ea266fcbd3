"""Threads that run what is submitted, also while the interpreter ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from torchcache.threads import Threads


def test_results_errors_and_order() -> None:
    ran: list[int] = []
    with Threads(1, name="t") as threads:
        futures = [threads.submit(ran.append, i) for i in range(50)]
        failed = threads.submit(int, "x")
        assert threads.submit(int, "7", base=8).result(60) == 7
    assert ran == list(range(50))
    assert all(future.done() for future in futures)
    with pytest.raises(ValueError, match="'x'"):
        failed.result()


def test_no_more_threads_than_allowed_and_none_left() -> None:
    names: set[str] = set()
    gate = threading.Barrier(3)
    with Threads(3, name="t") as threads:
        for _ in range(30):
            threads.submit(lambda: (gate.wait(60), names.add(threading.current_thread().name)))
    assert names == {"t-0", "t-1", "t-2"}
    assert not names & {thread.name for thread in threading.enumerate()}


def test_what_is_cancelled_does_not_run_and_what_ran_is_let_go() -> None:
    class Argument:
        pass

    argument, let_go, started = Argument(), threading.Event(), threading.Event()
    weakref.finalize(argument, let_go.set)
    with Threads(1, name="t") as threads:
        threads.submit(lambda _: None, argument)
        del argument
        assert let_go.wait(60)
        going = threading.Event()
        threads.submit(lambda: (started.set(), going.wait(60)))
        assert started.wait(60)
        waiting = threads.submit(let_go.clear)
        assert waiting.cancel()
        going.set()
    assert let_go.is_set()


def test_an_error_keeps_nothing_alive_once_it_is_gone() -> None:
    class Argument:
        pass

    def fail(argument: Argument) -> None:
        raise ValueError("no")

    argument = Argument()
    gone = weakref.ref(argument)
    with gc_off():
        with Threads(1, name="t") as threads:
            failed = threads.submit(fail, argument)
        del argument
        assert isinstance(failed.exception(10), ValueError)
        del failed
        assert gone() is None


@contextmanager
def gc_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_they_start_when_the_main_thread_is_done() -> None:
    script = """if True:
        import threading
        from torchcache.threads import Threads
        def late():
            threading.main_thread().join()
            with Threads(2, name="t") as threads:
                print(threads.submit(sum, [1, 2]).result())
        threading.Thread(target=late).start()
    """
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "3\n"
