"""Saves and loads a state, and says what each took at its most beside the state: run by test_checkpoint_memory.py."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc

MIB: Final = 1 << 20
STATE_BYTES: Final = 512 * MIB


def strided(seed: int) -> dict[str, Any]:
    """Tensors of 4 MiB, none contiguous."""
    return {f"w{n}": torch.full((1024, 1024), seed + n).int().t() for n in range(STATE_BYTES // (4 * MIB))}


def views(seed: int) -> dict[str, Any]:
    """Every 128th element of one large tensor each, with an offset."""
    base = torch.arange(STATE_BYTES // 4, dtype=torch.int32).add_(seed)
    return {f"w{n}": base[n::128] for n in range(128)}


def small(seed: int) -> dict[str, Any]:
    """Columns of one large tensor: 4,096 of 128 KiB."""
    base = torch.arange(STATE_BYTES // 4, dtype=torch.int32).add_(seed).view(-1, 4096)
    return {f"w{n}": base[:, n] for n in range(4096)}


def contiguous(seed: int) -> dict[str, Any]:
    """Written from where it is."""
    return {f"w{n}": torch.full((MIB,), seed + n, dtype=torch.int32) for n in range(STATE_BYTES // (4 * MIB))}


def noise(seed: int) -> dict[str, Any]:
    """Half of every element: what gets half as large when it is compressed."""
    chance = torch.Generator().manual_seed(seed)
    numbers = range(STATE_BYTES // (4 * MIB))
    return {f"w{n}": torch.randint(1 << 16, (MIB,), dtype=torch.int32, generator=chance) for n in numbers}


def objects(seed: int) -> dict[str, Any]:
    """Arrays of 1 MiB that aren't torch's: nothing tells how large they become before they are pickled."""
    return {f"w{n}": np.full(MIB // 4, seed + n, dtype=np.int32) for n in range(STATE_BYTES // MIB)}


KINDS: Final = {made.__name__: made for made in (strided, views, small, contiguous, noise, objects)}


def most_taken(what: Callable[[], None]) -> int:
    """Bytes that `what` took at its most beyond what was there: the kernel's own high-water mark."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew, see proc(5)
    before = _status("VmRSS")
    what()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main(root: str, kind: str, bound: int, compression: str | None, pipe: Connection) -> None:
    """Sends the bytes that a save took, and those that a load into the same kind of tensors took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Of the local lane the store's files, which it maps, would count.
    with tc.LocalPool(f"{root}/pool", "2GB", lane="flight") as pool:

        def save(state: dict[str, Any], name: str) -> None:
            writer = tc.CacheStorageWriter(
                f"{root}/{name}", pool=pool, extra_memory_bytes=bound, compression=compression
            )
            dcp.save(state, storage_writer=writer, no_dist=True)

        def load(state: dict[str, Any], name: str) -> None:
            reader = tc.CacheStorageReader(f"{root}/{name}", pool=pool, extra_memory_bytes=bound)
            dcp.load(state, storage_reader=reader, no_dist=True)

        few = {"a": torch.ones(4, 4).t(), "b": np.ones(3)}
        save(few, "first")  # what is made once is made
        load({"a": torch.zeros(4, 4).t()}, "first")
        state = KINDS[kind](1)
        saved = most_taken(lambda: save(state, "state"))
        loaded = 0
        if kind != "objects":
            state = KINDS[kind](0)
            loaded = most_taken(lambda: load(state, "state"))
            assert all(torch.equal(state[name], tensor) for name, tensor in KINDS[kind](1).items())
        pipe.send((saved, loaded))
