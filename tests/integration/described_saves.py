"""Checkpoints of self-describing tensors: saved and loaded as torch's DCP does, with the errors of ours as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from tests.integration.self_describing import content
from torchcache.checkpoint import CacheStorageReader, CacheStorageWriter
from torchcache.pool import Pool


def state_of(uri: str, number: int, size: int, *, frozen: int = 0, empty: bool = False) -> dict[str, Any]:
    """Save `number` of a path: about `size` bytes in two tensors, and the number; and `frozen` bytes, if any, which are
    the same in all saves of the folder."""
    state: dict[str, Any] = {"number": number}
    small = size // 8 // 64 * 64
    parts = [(f"{uri}/large", number, size // 64 * 64 - small), (f"{uri}/small", number, small)]
    if frozen:
        parts.append((f"{uri.rpartition('/')[0]}/frozen", 0, frozen))
    for key, generation, share in parts:
        name = key.rpartition("/")[2]
        if empty:
            state[name] = torch.zeros(share // 8, dtype=torch.int64)
        else:
            data = bytearray(content(key, generation, share))
            state[name] = torch.frombuffer(data, dtype=torch.int64)
    return state


def save(pool: Pool, uri: str, number: int, size: int, *, frozen: int = 0, overwrite: bool = False) -> None:
    """Saves `state_of` all that, committed in the pool. Raises the error that the save met."""
    writer = CacheStorageWriter(uri, pool=pool, overwrite=overwrite, reuse_unchanged=frozen > 0)
    try:
        dcp.save(state_of(uri, number, size, frozen=frozen), storage_writer=writer)
    except CheckpointException as failed:
        (wrapped,) = failed.failures.values()
        raise wrapped[0] from None


def load(pool: Pool, uri: str, size: int, *, frozen: int = 0) -> tuple[int, list[str]]:
    """The number of the save that lies at `uri`, and the names of what isn't, bit by bit, as that save was."""
    state = state_of(uri, 0, size, frozen=frozen, empty=True)
    _load(state, CacheStorageReader(uri, pool=pool))
    number = int(state["number"])
    right = state_of(uri, number, size, frozen=frozen)
    return number, [n for n, value in state.items() if not torch.equal(_tensor(value), _tensor(right[n]))]


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value)


def _load(state: dict[str, Any], reader: CacheStorageReader) -> None:
    """What `dcp.load` does in one process, but that it makes an AssertionError of what `read_metadata` raises."""
    planner = DefaultLoadPlanner()
    reader.reset()
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
