"""Stager: a copy that later changes don't reach, in memory that is used again and never for two saves at once."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.unit.checkpoint_states import assert_same, state
from torchcache.checkpoint import Stager
from torchcache.checkpoint.stager_memory import Memory
from torchcache.errors import CheckpointError

MIB = 1 << 20


def addresses(staged: dict[str, Any]) -> list[int]:
    return [value.data_ptr() for value in staged.values() if isinstance(value, torch.Tensor)]


def spoil(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            spoil(inner)
    elif isinstance(value, torch.Tensor) and value.numel():
        with torch.no_grad():
            value.view(torch.uint8).zero_() if value.itemsize == 1 else value.zero_()
    elif isinstance(value, list):
        value.clear()


@pytest.mark.parametrize("shared", [False, True])
def test_changes_after_it_don_t_reach_the_copy(shared: bool) -> None:
    original = state()
    original["model"]["half a byte"] = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    original["model"]["sparse"] = torch.eye(3).to_sparse()
    original["list"] = [torch.ones(2), {"deep": torch.ones(3)}]
    kept = {"sparse": original["model"].pop("sparse")}
    staged = Stager(shared=shared).stage({**original, **kept})
    spoil(original)
    expected = state()
    expected["model"]["half a byte"] = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert torch.equal(staged.pop("sparse").to_dense(), torch.eye(3))
    assert_same(staged.pop("list")[1], {"deep": torch.ones(3)})
    assert_same(staged, expected)


def test_what_is_in_the_state_twice_is_copied_once() -> None:
    weight = torch.arange(MIB, dtype=torch.float32)
    stager = Stager()
    staged = stager.stage({"a": weight, "tied": weight, "part": weight[10:20]})
    assert staged["a"].data_ptr() == staged["tied"].data_ptr()
    assert_same(staged["part"], weight[10:20])
    assert isinstance(stager._memory, Memory)
    assert stager._memory.size < weight.nbytes + 1024


def test_the_memory_is_used_again_once_nothing_refers_to_the_copy() -> None:
    stager = Stager()
    tensors = {"a": torch.ones(1000), "b": torch.ones(7, dtype=torch.int8)}
    first = addresses(stager.stage(tensors))
    for _ in range(5):
        assert addresses(stager.stage(tensors)) == first
    larger = {**tensors, "c": torch.ones(100_000)}
    second = addresses(stager.stage(larger))
    assert addresses(stager.stage(larger)) == second
    assert addresses(stager.stage(tensors)) == second[:2]
    stager.close()
    assert stager._memory is None


def test_any_one_tensor_keeps_the_whole_copy() -> None:
    """The dict may be gone: what was made of it, a flat state or a slice, still reads."""
    stager = Stager(when_busy="refuse")
    staged = stager.stage({"a": torch.ones(1000), "b": torch.full((10,), 2.0)})
    part = staged["b"][3:5].view(torch.int32)
    del staged
    gc.collect()
    with pytest.raises(CheckpointError, match="still reads the staged state"):
        stager.stage({"a": torch.zeros(1000)})
    assert part.view(torch.float32).eq(2).all()
    del part
    stager.stage({"a": torch.zeros(1000)})


def test_shared_memory_is_kept_by_the_dict() -> None:
    stager = Stager(shared=True, when_busy="refuse")
    staged = stager.stage({"a": torch.ones(1000)})
    with pytest.raises(CheckpointError):
        stager.stage({"a": torch.zeros(1000)})
    del staged
    stager.stage({"a": torch.zeros(1000)})


@pytest.mark.parametrize("shared", [False, True])
def test_a_shallow_copy_is_of_the_same_tensors_and_keeps_the_memory(shared: bool) -> None:
    stager = Stager(shared=shared, when_busy="refuse")
    staged = stager.stage({"a": torch.ones(1000)})
    copied = copy.copy(staged)
    assert copied["a"] is staged["a"]
    del staged
    with pytest.raises(CheckpointError, match="still reads the staged state"):
        stager.stage({"a": torch.zeros(1000)})
    del copied
    stager.stage({"a": torch.zeros(1000)})


def test_the_next_waits_for_the_save_to_end() -> None:
    stager = Stager()
    tensors = {"a": torch.full((MIB,), 1.0)}
    held = [stager.stage(tensors)]
    after: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: after.append(stager.stage({"a": torch.full((MIB,), 2.0)})))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert held[0]["a"].eq(1).all()
    held.clear()
    thread.join(60)
    assert after[0]["a"].eq(2).all()


def test_a_cycle_or_a_kept_error_doesn_t_hold_it_up() -> None:
    stager = Stager()

    def fail(staged: dict[str, Any]) -> BaseException:
        try:
            raise ValueError("the disk is full")
        except ValueError as error:
            return error  # and with it this frame, and the staged state

    staged, save = stager.stage_save({"a": torch.ones(10)})
    errors: list[BaseException] = []

    def run(staged: dict[str, Any]) -> None:
        save.begun()
        errors.append(fail(staged))

    thread = threading.Thread(target=run, args=(staged,))
    del staged
    thread.start()
    thread.join()
    assert errors[0].__traceback__ is not None
    stager.stage({"a": torch.ones(10)})  # its thread has ended
    cycle: dict[str, Any] = {"state": stager.stage({"a": torch.ones(10)})}
    cycle["itself"] = cycle
    del cycle
    stager.stage({"a": torch.ones(10)})  # collected


def test_a_reference_that_never_goes_costs_memory_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache.checkpoint.stager._PATIENCE_S", 0.1)
    stager = Stager()
    forever = stager.stage({"a": torch.ones(1000)})
    second = stager.stage({"a": torch.zeros(1000)})
    assert forever["a"].eq(1).all()
    assert second["a"].eq(0).all()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("shared", [False, True])
def test_fifty_saves_take_no_more_memory_than_two(shared: bool) -> None:
    """In a process of its own: this one may have freed memory that it would take from."""
    process = multiprocessing.get_context("spawn").Process(target=_stage_fifty_times, args=(shared,))
    process.start()
    process.join(250)
    assert process.exitcode == 0


def _stage_fifty_times(shared: bool) -> None:
    stager = Stager(shared=shared)
    tensors = {f"w{i}": torch.ones(MIB) for i in range(4)}  # 16 MiB
    size = sum(tensor.nbytes for tensor in tensors.values())
    before = resident_bytes()
    stager.stage(tensors)
    once = resident_bytes()
    assert once - before > 0.9 * size  # so that this counts what it should
    for _ in range(50):
        stager.stage(tensors)
    assert resident_bytes() - once < 0.1 * size
    stager.close()
    del tensors
    gc.collect()
    assert resident_bytes() - before < 0.5 * size


def _read(pipe: Connection) -> None:
    staged = pipe.recv()
    pipe.send((type(staged), float(staged["a"].sum()), staged["a"].untyped_storage().is_shared()))
    pipe.recv()
    pipe.send(float(staged["a"].sum()))


@pytest.mark.forks
def test_another_process_gets_a_copy_of_what_is_not_shared() -> None:
    """Pickled twice, and read here meanwhile: nothing moves under whoever reads it."""
    context = multiprocessing.get_context("fork")
    stager = Stager()
    staged = stager.stage({"a": torch.ones(1000), "b": {"c": torch.full((10,), 2.0)}})
    where = addresses(staged)
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_read, args=(theirs,))
        process.start()
        ours.send(staged)
        assert ours.recv() == (dict, 1000.0, True)
        ours.send(None)
        assert ours.recv() == 1000.0
        process.join()
    assert addresses(staged) == where
    assert staged["b"]["c"].eq(2).all()
    assert stager._memory is not None
    del staged
    assert addresses(stager.stage({"a": torch.ones(1000), "b": {"c": torch.ones(10)}})) == where


@pytest.mark.forks
def test_another_process_reads_shared_memory_without_a_copy() -> None:
    import torch.multiprocessing as mp

    stager = Stager(shared=True)
    staged = stager.stage({"a": torch.ones(1000)})
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(theirs,))
    process.start()
    ours.send(staged)
    assert ours.recv() == (dict, 1000.0, True)
    staged["a"].fill_(2)  # the same memory
    ours.send(None)
    assert ours.recv() == 2000.0
    process.join()


def test_a_forked_child_stages_in_memory_of_its_own() -> None:
    stager = Stager(when_busy="refuse")
    staged = stager.stage({"a": torch.ones(10)})
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child(stage: Callable[..., Any]) -> None:
        theirs.send(float(stage({"a": torch.zeros(10)})["a"].sum()))

    process = context.Process(target=child, args=(stager.stage,))
    process.start()
    assert ours.recv() == 0.0
    process.join()
    assert staged["a"].eq(1).all()
