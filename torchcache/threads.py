"""Threads for work that may still come while the interpreter ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _run(future: Future[_Result], work: Callable[[], _Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
        future.set_exception(error)
    else:
        future.set_result(result)
    finally:
        del future  # the error holds this frame: what both hold would be there until a collection


class Threads:
    """Up to `most` threads that run what is submitted, and end with the `with` block.

    A ThreadPoolExecutor takes nothing more from the moment the main thread is done, and that is when the `async_save`
    of a script's last lines writes its checkpoint.
    """

    def __init__(self, most: int, *, name: str) -> None:
        self._most = most
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Runs `function` in one of the threads, the earliest submitted first."""
        future: Future[_Result] = Future()
        task = partial(_run, future, partial(function, *args, **kwargs))
        if len(self._threads) < self._most:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._tasks.put(task)
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # with the arguments it holds, before the next one comes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
