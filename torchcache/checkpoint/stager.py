"""One copy of the state into memory that is used again: all that an asynchronous save stops training for."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from torchcache.checkpoint.stager_memory import Memory, SharedMemory, Staged
from torchcache.checkpoint.stager_plan import Plan
from torchcache.errors import CheckpointError

_log = logging.getLogger(__name__)

_GARBAGE_S: Final = 1.0
_PATIENCE_S: Final = 60.0
_POLL_S: Final = 0.05

WhenBusy = Literal["wait", "refuse"]


class StagedSave:
    """A staged state that a save may still be reading.

    It is over when nothing refers to the staged tensors any more, when `release` is called, or when the thread that
    said it had `begun` has ended: an exception that somebody keeps refers to what it came from forever.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begun(self) -> None:
        """Called by the thread that saves."""
        self._thread = threading.current_thread()

    def release(self) -> None:
        """The save has read all it wants."""
        self._over.set()

    @property
    def is_over(self) -> bool:
        return self._over.is_set() or (self._thread is not None and not self._thread.is_alive())

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, within the time."""
        start_s = time.monotonic()
        deadline, collect_s = start_s + timeout_s, start_s + _GARBAGE_S
        while not self.is_over:
            now_s = time.monotonic()
            if self._thread is None and now_s >= deadline:
                return False
            if now_s >= collect_s:
                # A cycle may be all that refers to it. Ever later again: while another thread collects, nothing goes.
                collect_s += 2 * (collect_s - start_s)
                gc.collect()
            self._over.wait(_POLL_S)
        return True


class Stager:
    """Copies a state so that training can go on while it is saved: torch's AsyncStager, for `dcp.async_save`.

    The copy goes into memory that is kept and used for the next save: pinned if there is a GPU; with `shared`, memory
    that the process of `AsyncCheckpointerType.PROCESS` reads without a further copy, but for a state with DTensors:
    torch can't send several of one memory, so all of it is copied once more to be sent. It is as large as the state on
    this rank, once. While an earlier save still reads it, `stage` waits for that to end, or with `when_busy="refuse"`
    raises CheckpointError; two saves are never mixed. Thread-safe. `close` gives the memory back.
    """

    def __init__(self, *, shared: bool = False, when_busy: WhenBusy = "wait") -> None:
        self._make: Callable[[int], Memory | SharedMemory] = SharedMemory if shared else Memory
        self._when_busy = when_busy
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._memory: Memory | SharedMemory | None = None
        self._save: StagedSave | None = None

    @property
    def should_synchronize_after_execute(self) -> bool:
        """No: `stage` returns when all is copied."""
        return False

    def synchronize_staging(self) -> None:
        """Nothing to do."""

    def stage(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the state that later changes of it don't reach. Raises CheckpointError if it is to refuse."""
        return self.stage_save(state_dict)[0]

    def stage_save(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], StagedSave]:
        """As `stage`, with what tells, and can be told, when the save is over."""
        with self._lock:
            if self._pid != os.getpid():  # the parent's, after a fork
                self._forget()
            self._await_last()
            plan = Plan(state_dict)
            if self._memory is None or self._memory.size < plan.size:
                self._memory = None  # before the next is made
                self._memory = self._make(plan.size)
            save = StagedSave()
            content = plan.carry_out(self._memory.places)
            staged = Staged(content, is_shared=isinstance(self._memory, SharedMemory))
            weakref.finalize(self._memory.lend(staged), save.release).atexit = False
            self._save = save
            return staged, save

    def _await_last(self) -> None:
        if self._save is None or self._save.is_over:
            return
        if self._when_busy == "refuse":
            raise CheckpointError("the last save still reads the staged state: wait for its future first")
        if not self._save.wait(_PATIENCE_S):
            _log.warning(
                "something still refers to the staged state of the last save, perhaps its future: this one gets memory "
                "of its own"
            )
            self._memory = None

    def close(self) -> None:
        """Gives the memory back, as soon as no save reads it."""
        with self._lock:
            self._forget()


_default: Final = Stager()


def default_stager() -> Stager:
    """The one that all writers of this process share: a writer may live for one save, the memory stays."""
    return _default
