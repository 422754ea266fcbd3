"""Fifty saves in the background that really overlap: while one is written, the next is asked for, or already copied.

What makes them overlap is events: a save goes on writing until the one behind it has come as far as the test says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

import torchcache as tc
from tests.e2e.throwaway import throwaway
from tests.waiting import PATIENCE_S, until
from torchcache.checkpoint.stager import Stager, default_stager
from torchcache.checkpoint.stager_memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAVES = 50
REFUSED = (7, 8, 30)
"""Steps whose path is taken already: their saves fail, once they are under way."""

Event = tuple[str, int]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    root = tmp_path_factory.mktemp("pool")
    with throwaway(tc.LocalPool(root, "500MB"), root) as pool:
        yield pool


class Log:
    """What happened, in order; and who waits for what."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def note(self, what: str, step: int) -> None:
        with self._changed:
            self.events.append((what, step))
            self._changed.notify_all()

    def wait_for(self, what: str, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (what, step) in self.events, PATIENCE_S), (what, step)

    def at(self, what: str, step: int) -> int:
        return self.events.index((what, step))


class Held(tc.CacheStorageWriter):
    """Ends the writing of a step's data once `until_what` of the step behind it is in the log."""

    def __init__(self, path: Path, *, step: int, log: Log, until_what: str, pool: tc.Pool) -> None:
        super().__init__(path / f"step-{step}", pool=pool)
        self._step, self._log, self._until_what = step, log, until_what

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._log.note("asked", self._step)
        staged = super().stage(state_dict)
        self._log.note("copied", self._step)
        return staged

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        self._log.note("begun", self._step)
        try:
            return super().prepare_global_plan(plans)
        except tc.AlreadyExists:
            self._await_next()
            raise

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        self._await_next()
        return done

    def _await_next(self) -> None:
        if self._step + 1 < SAVES:
            self._log.wait_for(self._until_what, self._step + 1)

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self._log.note("committed", self._step)


def moment(step: int) -> dict[str, torch.Tensor]:
    """The state as it is at a step: no bit of it that of another one."""
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.rand(300, 500, generator=generator).t(),
        "half": torch.rand(10_000, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(step),
    }


def set_to(state: dict[str, torch.Tensor], step: int) -> None:
    for name, value in moment(step).items():
        state[name].copy_(value)


def require_moments(pool: tc.Pool, root: Path) -> None:
    for step in range(SAVES):
        loaded = {name: torch.empty_like(value) for name, value in moment(0).items()}
        reader = tc.CacheStorageReader(root / f"step-{step}", pool=pool)
        if step in REFUSED:  # still what was there
            dcp.load({"taken": torch.zeros(1)}, storage_reader=reader)
            continue
        dcp.load(loaded, storage_reader=reader)
        assert [n for n, value in moment(step).items() if not torch.equal(loaded[n], value)] == [], step


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def saving_threads() -> int:
    return sum(
        "ThreadPool" in thread.name or "torchcache-save" in thread.name for thread in threading.enumerate()
    )


class Outcomes:
    """What each save came to, without the errors themselves: one that is kept refers to the state it was met with."""

    def __init__(self) -> None:
        self.of_step: dict[int, str] = {}

    def note(self, step: int, future: Future[Any]) -> None:
        error = future.exception()
        inner = error.failures[0][0] if isinstance(error, dcp.CheckpointException) else error
        self.of_step[step] = type(inner).__name__


@pytest.mark.parametrize("stagers", [1, 2])
def test_fifty_saves_that_overlap(pool: tc.Pool, tmp_path: Path, stagers: int) -> None:
    """With one stager the next waits, while one is written, to be copied; with two it is copied meanwhile."""
    for step in REFUSED:
        dcp.save(
            {"taken": torch.zeros(1)},
            storage_writer=tc.CacheStorageWriter(tmp_path / f"step-{step}", pool=pool),
        )
    default_stager().close()
    log, state = Log(), moment(0)
    own = [Stager() for _ in range(stagers)] if stagers > 1 else [default_stager()]
    outcomes, kept = Outcomes(), []
    memories: set[int] = set()
    most_threads = 0
    early_descriptors = 0
    for step in range(SAVES):
        set_to(state, step)
        held = Held(tmp_path, step=step, log=log, until_what="asked" if stagers == 1 else "copied", pool=pool)
        stager = None if stagers == 1 else own[step % stagers]
        future: Any = dcp.async_save(state, storage_writer=held, async_stager=stager)
        future.add_done_callback(partial(outcomes.note, step))
        if stager is not None:
            log.note("copied", step)
        elif (
            step in REFUSED
        ):  # whoever keeps the error of a save holds nothing up where the writer is the stager
            kept.append(future)
        del future
        for value in state.values():  # what comes now belongs to no save
            value.zero_()
        memories |= {memory._whole.data_ptr() for one in own if isinstance(memory := one._memory, Memory)}
        most_threads = max(most_threads, saving_threads())
        if step == SAVES // 2:
            early_descriptors = descriptors()
    until(lambda: len(outcomes.of_step) == SAVES)
    assert outcomes.of_step == {n: "AlreadyExists" if n in REFUSED else "NoneType" for n in range(SAVES)}
    require_moments(pool, tmp_path)
    begun = [step for what, step in log.events if what == "begun"]
    committed = [step for what, step in log.events if what == "committed"]
    assert begun == sorted(begun) and len(begun) == SAVES
    assert sorted(committed) == [step for step in range(SAVES) if step not in REFUSED]
    if stagers == 1:  # one behind the other: the next begins once the last is all done
        assert committed == sorted(committed)
        for step in committed[:-1]:
            assert log.at("committed", step) < log.at("begun", step + 1)
            assert log.at("asked", step + 1) < log.at("committed", step)  # they overlapped
    else:
        for step in committed[:-1]:
            assert log.at("copied", step + 1) < log.at("committed", step)
    # As many copies of the state as stagers, and of threads as saves at a time.
    assert len(memories) == stagers
    assert most_threads <= stagers * (1 + 2 * (os.cpu_count() or 1))
    until(lambda: descriptors() <= early_descriptors + 2, "descriptors that were opened since the middle")


def test_a_stager_that_refuses_leaves_the_save_under_way_alone(pool: tc.Pool, tmp_path: Path) -> None:
    log, state, stager = Log(), moment(0), Stager(when_busy="refuse")
    saved: list[Any] = []
    for step in range(SAVES):
        set_to(state, step)
        held = Held(tmp_path, step=step, log=log, until_what="refused", pool=pool)
        saved.append(dcp.async_save(state, storage_writer=held, async_stager=stager))
        log.wait_for("begun", step)
        for value in state.values():
            value.zero_()
        if step + 1 < SAVES:
            with pytest.raises(tc.CheckpointError, match="wait for its future first"):
                dcp.async_save(state, storage_writer=held, async_stager=stager)
            assert not saved[-1].done()
            log.note("refused", step + 1)
        saved[-1].result(PATIENCE_S)
        until(lambda: stager._save is None or stager._save.is_over)
    for step in range(SAVES):
        loaded = {name: torch.empty_like(value) for name, value in moment(0).items()}
        dcp.load(loaded, storage_reader=tc.CacheStorageReader(tmp_path / f"step-{step}", pool=pool))
        assert [n for n, value in moment(step).items() if not torch.equal(loaded[n], value)] == []
