"""What the ranks of the checkpoint tests do: run by spawned processes, so a module of its own."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from torchcache.checkpoint import Stager

WORLD = 2
ROWS, COLUMNS = 500, 300


class Ranks:
    """WORLD processes in one gloo group, which run scenarios one after the other. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "group"), theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, scenario: Callable[[Any, str], None], pool: Any, uri: str) -> None:
        """Raises AssertionError with the traceback of the first rank that failed; the ranks are of no use then."""
        for pipe in self._pipes:
            pipe.send((scenario, pool, uri))
        waiting = list(self._pipes)
        while waiting:
            ready = wait(waiting, timeout=150)
            assert ready, f"ranks {[self._pipes.index(pipe) for pipe in waiting]} hang in {scenario.__name__}"
            for pipe in ready:
                failure = pipe.recv()
                assert failure is None, f"rank {self._pipes.index(pipe)}:\n{failure}"
                waiting.remove(pipe)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # of the process that async_save starts
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while True:
        try:
            scenario, pool, uri = pipe.recv()
        except EOFError:
            break
        try:
            scenario(pool, uri)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


def whole() -> dict[str, torch.Tensor]:
    """The tensors of the state as one process would hold them."""
    generator = torch.Generator().manual_seed(3)
    return {
        "rows": torch.randn(ROWS, COLUMNS, generator=generator),
        "columns": torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16),
        "uneven": torch.arange(7 * 5, dtype=torch.int64).reshape(7, 5),
        "copied": torch.randn(1000, generator=generator),
        "plain": torch.randn(2000, generator=generator),
    }


def sharded(dimensions: dict[str, int]) -> dict[str, Any]:
    """The state on this rank: DTensors sharded along `dimensions`, one replicated, one plain, and objects."""
    mesh = init_device_mesh("cpu", (WORLD,))
    state: dict[str, Any] = {}
    for name, tensor in whole().items():
        placement = Shard(dimensions[name]) if name in dimensions else Replicate()
        state[name] = tensor if name == "plain" else distribute_tensor(tensor, mesh, [placement])
    return {"model": state, "step": 5, "settings": {"lr": 0.1, "names": ["a", "b"]}}


AS_SAVED = {"rows": 0, "columns": 1, "uneven": 0}
OTHERWISE = {"rows": 1, "columns": 0, "uneven": 1}


def emptied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        return DTensor.from_local(
            torch.zeros_like(state.to_local()),
            state.device_mesh,
            state.placements,
            shape=state.shape,
            stride=state.stride(),
        )
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else None


def assert_loaded(state: dict[str, Any]) -> None:
    for name, expected in whole().items():
        found = state["model"][name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert torch.equal(found, expected), name
    assert state["step"] == 5
    assert state["settings"] == {"lr": 0.1, "names": ["a", "b"]}


# ---- scenarios ----


def save_and_reshard(pool: Any, uri: str) -> None:
    """Saves sharded one way, loads it the same way and another."""
    dcp.save(sharded(AS_SAVED), storage_writer=tc.CacheStorageWriter(uri, pool=pool))
    for dimensions in (AS_SAVED, OTHERWISE):
        state = emptied(sharded(dimensions))
        dcp.load(state, storage_reader=tc.CacheStorageReader(uri, pool=pool))
        assert_loaded(state)


def ours_and_stock_by_name(pool: Any, uri: str) -> None:
    """Through `torchcache://`, by torch's fsspec reader and writer and by ours: each loads what the other saved."""
    named = uri.replace("s3://", "torchcache://s3/")
    ours = tc.CacheStorageWriter(f"{named}/ours", pool=pool, durability="store")
    dcp.save(sharded(AS_SAVED), storage_writer=ours)
    dcp.save(sharded(AS_SAVED), storage_writer=FsspecWriter(f"{named}/stock", pool=pool))
    readers = [
        FsspecReader(f"{named}/ours", pool=pool),
        tc.CacheStorageReader(f"{named}/ours", pool=pool),
        tc.CacheStorageReader(f"{named}/stock", pool=pool),
    ]
    for reader in readers:
        state = emptied(sharded(OTHERWISE))
        dcp.load(state, storage_reader=reader)
        assert_loaded(state)


def load_sharded(pool: Any, uri: str) -> None:
    state = emptied(sharded(OTHERWISE))
    dcp.load(state, storage_reader=tc.CacheStorageReader(uri, pool=pool))
    assert_loaded(state)


LARGE = 1_000_000


def load_replicated(pool: Any, uri: str) -> None:
    """The same on every rank, begun by all at the same time."""
    state = {name: torch.zeros(LARGE) for name in ("a", "b")}
    dist.barrier()
    dcp.load(state, storage_reader=tc.CacheStorageReader(uri, pool=pool))
    assert torch.equal(state["a"], torch.arange(float(LARGE))) and state["b"].eq(1).all()


def save_with_cached_plans(pool: Any, uri: str) -> None:
    """Three steps, of which two have no plan to send; the third changes rank 1's alone."""
    writer = tc.CacheStorageWriter(uri, pool=pool)
    rank = dist.get_rank()
    for step in range(4):
        state = {"common": torch.full((64,), step), f"of-{rank}": torch.full((32,), 10 * step + rank)}
        if step == 3 and rank == 1:
            state["new"] = torch.full((8,), step)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=writer, planner=planner, checkpoint_id=f"{uri}/step-{step}")
    for step in range(4):
        loaded = {
            "common": torch.zeros(64, dtype=torch.int64),
            f"of-{rank}": torch.zeros(32, dtype=torch.int64),
        }
        dcp.load(loaded, storage_reader=tc.CacheStorageReader(f"{uri}/step-{step}", pool=pool))
        assert loaded["common"].eq(step).all(), step
        assert loaded[f"of-{rank}"].eq(10 * step + rank).all(), step


def save_again(pool: Any, uri: str) -> None:
    """Three steps of a state that doesn't change, of which two have no plan to send; each is loaded another way."""
    writer = tc.CacheStorageWriter(uri, pool=pool, reuse_unchanged=True)
    for step in range(3):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(
            sharded(AS_SAVED), storage_writer=writer, planner=planner, checkpoint_id=f"{uri}/step-{step}"
        )
    for step in range(3):
        load_sharded(pool, f"{uri}/step-{step}")


def fail_then_save(pool: Any, uri: str) -> None:
    """A rank fails in the middle (F32): every rank hears of it, nothing is committed, and the path is free again."""

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            if dist.get_rank() == 1:
                raise tc.OutOfSpace("the disk of rank 1 is full")
            return super().resolve_data(write_item)

    state = sharded(AS_SAVED)
    writer = tc.CacheStorageWriter(uri, pool=pool)
    for _ in range(2):
        try:
            dcp.save(state, storage_writer=writer, planner=Failing())
        except dcp.CheckpointException as error:
            assert isinstance(error.failures[1][0], tc.OutOfSpace)
        else:
            raise AssertionError("the save should have failed")
    dist.barrier()
    try:
        dcp.load(emptied(state), storage_reader=tc.CacheStorageReader(uri, pool=pool))
    except dcp.CheckpointException as error:
        assert "no committed checkpoint" in str(error)
    else:
        raise AssertionError("there should be nothing to load")
    dcp.save(state, storage_writer=tc.CacheStorageWriter(uri, pool=pool))
    load_sharded(pool, uri)


def save_where_one_rank_finds_no_room(pool: Any, uri: str) -> None:
    """At its second step, though it gives back what it has borrowed: all ranks begin anew, and borrow nothing."""
    rank = dist.get_rank()
    state = {f"frozen-{rank}": torch.arange(500_000) + rank, f"new-{rank}": torch.zeros(100_000)}
    write = tc.Pool.write
    refused: list[str] = []

    def full(self: tc.Pool, namespace: str, *args: Any, **options: Any) -> None:
        if rank == 1 and refused in ([], [namespace]):
            refused[:] = [namespace]
            raise tc.OutOfSpace("the disk of rank 1 is full")
        write(self, namespace, *args, **options)

    with tc.CheckpointManager(uri, pool=pool, rng=False) as manager:
        for step in range(3):
            state[f"new-{rank}"] += 1
            tc.Pool.write = full if step == 1 else write  # type: ignore[method-assign]
            manager.save(step, state)
            loaded = emptied(state)
            manager.load(loaded, step)
            assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()), step
    assert bool(refused) == (rank == 1)


def save_without_collectives(pool: Any, uri: str) -> None:
    rank = dist.get_rank()
    state = {"mine": torch.full((100,), rank), "step": rank}
    dcp.save(state, storage_writer=tc.CacheStorageWriter(uri, pool=pool), use_collectives=False)
    loaded = {"mine": torch.zeros(100, dtype=torch.int64), "step": None}
    dcp.load(loaded, storage_reader=tc.CacheStorageReader(uri, pool=pool))
    assert loaded["mine"].eq(rank).all()
    assert loaded["step"] == rank


def save_from_a_process(pool: Any, uri: str) -> None:
    """async_save's process executor: writer and state are pickled into another process each time."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    writer = tc.CacheStorageWriter(uri, pool=pool)
    for step in (1, 2):
        future: Any = dcp.async_save(
            sharded(AS_SAVED),
            checkpoint_id=f"{uri}/step-{step}",
            storage_writer=writer,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result(120)
    state = emptied(sharded(OTHERWISE))
    dcp.load(state, storage_reader=tc.CacheStorageReader(f"{uri}/step-2", pool=pool))
    assert_loaded(state)
    # An error of the other process arrives here.
    future = dcp.async_save(
        sharded(AS_SAVED),
        checkpoint_id=f"{uri}/step-2",
        storage_writer=writer,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    try:
        future.result(120)
    except BaseException as error:
        assert "pass overwrite=True or another path" in str(error)
    else:
        raise AssertionError("step-2 should not have been overwritten")


def save_from_a_thread(pool: Any, uri: str) -> None:
    """async_save's thread executor, overlapping with changes of the state it was given."""
    state = sharded(AS_SAVED)
    future: Any = dcp.async_save(state, storage_writer=tc.CacheStorageWriter(uri, pool=pool))
    state["model"]["plain"].zero_()
    future.result(300)
    load_sharded(pool, uri)


def save_one_behind_the_other(pool: Any, uri: str) -> None:
    """While a save is held up, the next waits to be staged, or is refused: on each rank, and no two are mixed."""
    go_on = threading.Event()

    class HeldUp(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            assert go_on.wait(120)
            return super().resolve_data(write_item)

    def begin(step: int, stager: Stager) -> Any:
        return dcp.async_save(
            {"w": torch.full((1000,), step), f"of-{rank}": torch.full((1000,), step)},
            checkpoint_id=f"{uri}/step-{step}",
            storage_writer=tc.CacheStorageWriter(uri, pool=pool),
            planner=HeldUp(),
            async_stager=stager,
        )

    rank = dist.get_rank()
    stager, refusing = Stager(), Stager(when_busy="refuse")
    futures = [begin(0, stager)]
    behind = threading.Thread(target=lambda: futures.append(begin(1, stager)))
    behind.start()
    behind.join(0.3)
    assert behind.is_alive()
    go_on.set()
    behind.join(120)
    for future in futures:
        future.result(120)
    go_on.clear()
    futures = [begin(2, refusing)]
    assert_raises(tc.CheckpointError, "still reads the staged state", begin, 3, refusing)
    go_on.set()
    futures[0].result(120)
    for step in range(3):
        loaded = {"w": torch.zeros(1000).long(), f"of-{rank}": torch.zeros(1000).long()}
        dcp.load(loaded, storage_reader=tc.CacheStorageReader(f"{uri}/step-{step}", pool=pool))
        assert all(tensor.eq(step).all() for tensor in loaded.values()), step


# ---- CheckpointManager ----


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


def training(seed: int) -> dict[str, Any]:
    """A sharded model, and a loader of this rank's own."""
    loader = StatefulDataLoader(
        Numbers(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    return {**sharded(AS_SAVED), "loader": loader}


def manage(pool: Any, uri: str) -> None:
    """Ranks stand at different places, with different random numbers; each goes on from its own."""
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    with tc.CheckpointManager(uri, keep_last=2, pool=pool) as manager:
        assert manager.latest() is None
        state = training(rank)
        batches = iter(state["loader"])
        for _ in range(3 + rank):
            next(batches)
        manager.save(1, state)
        expected_numbers, expected_batches = torch.rand(3), [b.tolist() for b in batches]

        other = emptied({k: v for k, v in training(7).items() if k != "loader"})
        other["loader"] = training(7)["loader"]
        torch.manual_seed(0)
        assert manager.load(other) == 1
        assert_loaded(other)
        assert torch.equal(torch.rand(3), expected_numbers)
        assert [b.tolist() for b in other["loader"]] == expected_batches

        del state["loader"]
        for step in (2, 3):
            future = manager.save_async(step, state)
            future.result(300)
            manager.wait_durable(step)
        assert [(s.step, s.state) for s in manager.list()] == [(2, "durable"), (3, "durable")]
        manager.delete(3)
        assert manager.latest() == 2
        other = emptied(sharded(OTHERWISE))
        assert manager.load(other) == 2
        assert_loaded(other)


def manager_errors_are_everybody_s(pool: Any, uri: str) -> None:
    """What one rank meets, all raise; and all go on together after it."""
    rank = dist.get_rank()
    manager = tc.CheckpointManager(uri, pool=pool)

    class Failing:
        def state_dict(self) -> dict[str, Any]:
            if rank == 1:
                raise ValueError("the state of rank 1 is gone")
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Refusing(Failing):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if rank == 0:
                raise ValueError("rank 0 takes no state")

    for call in (manager.save, manager.save_async):
        assert_raises(tc.CheckpointError, "the state of rank 1 is gone", call, 1, {"a": Failing()})
    assert_raises(tc.NotCommitted, "no checkpoint under", manager.load, {"a": None})
    manager.save(1, {"a": torch.ones(3), "empty": {}})
    assert_raises(tc.AlreadyExists, "overwrite=True", manager.save, 1, {"a": torch.ones(3)})
    future = manager.save_async(1, {"a": torch.ones(3)})
    assert_raises(tc.AlreadyExists, "overwrite=True", future.result, 60)
    assert_raises(
        tc.CheckpointError, "rank 0 takes no state", manager.load, {"a": torch.zeros(3), "empty": Refusing()}
    )
    loader = StatefulDataLoader(Numbers()) if rank == 1 else 0
    assert_raises(tc.CheckpointError, "no position for 'a' on rank 1 of 2", manager.load, {"a": loader})
    loaded = {"a": torch.zeros(3)}
    assert manager.load(loaded) == 1
    assert loaded["a"].eq(1).all()
    manager.close()


def assert_raises(kind: type[Exception], text: str, call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"{call} should have raised {kind.__name__}")


def stage_for_a_process(pool: Any, uri: str) -> None:
    """Our stager with torch's process executor: shared memory, used again, and never for two saves at once."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    stager = Stager(shared=True)
    state = {"w": torch.zeros(200_000), **sharded(AS_SAVED)["model"]}
    futures: list[Any] = []
    addresses = set()
    for step in range(4):
        state["w"].fill_(step)
        futures.append(
            dcp.async_save(
                state,
                checkpoint_id=f"{uri}/step-{step}",
                storage_writer=tc.CacheStorageWriter(uri, pool=pool),
                async_stager=stager,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            )
        )
        state["w"].fill_(-1)
        addresses.add(stager._memory._storage.data_ptr())  # type: ignore[union-attr]
    for future in futures:
        future.result(120)
    assert len(addresses) == 1
    for step in range(4):
        loaded = {"w": torch.empty(200_000)}
        dcp.load(loaded, storage_reader=tc.CacheStorageReader(f"{uri}/step-{step}", pool=pool))
        assert loaded["w"].eq(step).all(), step
