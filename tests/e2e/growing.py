"""Saves one checkpoint after the other, each instead of the last, and says what that took: run by test_growth.py."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import torchcache as tc
from tests.waiting import until
from torchcache.checkpoint import Stager
from torchcache.embedded import read_endpoint

MIB = 1 << 20
STATE_BYTES = 16 * MIB
SETTLED_AFTER = 4
"""Saves until all that is made once is made: threads, memory to stage in, segments to recycle."""


@dataclass(frozen=True)
class Use:
    """What processes take: the trainer's and torch's own beside it, and the servers'."""

    memory_bytes: int
    served_memory_bytes: int
    descriptors: int
    served_descriptors: int
    threads: int
    served_threads: int
    store_bytes: int
    shared_files: int

    @classmethod
    def now(cls, root: Path) -> Use:
        ours = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
        servers = [found["pid"] for folder in root.glob("server-*") if (found := read_endpoint(folder))]
        assert servers
        return cls(
            *(measure(who) for measure in (_memory, _descriptors, _threads) for who in (ours, servers)),
            sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file()),
            sum(len(list(Path("/dev/shm").glob(f"torch_{pid}_*"))) for pid in ours),
        )

    def grown(self, before: Use) -> dict[str, tuple[int, int]]:
        """What takes more than noise since `before`, with what it took and takes."""
        slack = {"memory_bytes": STATE_BYTES, "served_memory_bytes": STATE_BYTES, "store_bytes": STATE_BYTES}
        named = [(f.name, getattr(before, f.name), getattr(self, f.name)) for f in fields(self)]
        return {name: (was, is_) for name, was, is_ in named if is_ > was + slack.get(name, 2)}


def _memory(pids: Iterable[int]) -> int:
    """Without what only maps files."""
    kinds = re.compile(r"Rss(?:Anon|Shmem):\s+(\d+) kB")
    return 1024 * sum(
        int(kib) for pid in pids for kib in kinds.findall(Path(f"/proc/{pid}/status").read_text())
    )


def _descriptors(pids: Iterable[int]) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def _threads(pids: Iterable[int]) -> int:
    return sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids)


def main(folder: str, saves: int, *, in_process: bool) -> None:
    """Raises AssertionError if anything grows from the first few saves to the last."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # of the process that async_save starts
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    root, run = Path(folder, "pool"), Path(folder, "run")
    state = {f"w{i}": torch.zeros(STATE_BYTES // 4 // 4) for i in range(4)}
    stager = Stager(shared=in_process)
    before: Use | None = None
    with tc.LocalPool(root, "500MB") as pool:
        for step in range(saves):
            for name in ("w0", "w1", "w2"):  # the fourth is frozen
                state[name].fill_(step)
            saved: Any = dcp.async_save(
                state,
                storage_writer=tc.CacheStorageWriter(run / f"step-{step}", pool=pool),
                async_stager=stager,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS
                if in_process
                else AsyncCheckpointerType.THREAD,
            )
            saved.result(120)
            if step:
                pool.delete_save(*pool.resolve(f"file://{run}/step-{step - 1}"))
            if step == SETTLED_AFTER:
                _settle(pool, run, step)
                before = Use.now(root)
        _settle(pool, run, saves - 1)
        assert before is not None
        _assert_not_grown(root, before)
    dist.destroy_process_group()


def _assert_not_grown(root: Path, before: Use) -> None:
    """Threads that end, and what the store frees, are given their time."""
    try:
        until(lambda: not Use.now(root).grown(before), seconds=30)
    except AssertionError:
        raise AssertionError(f"it has grown: {Use.now(root).grown(before)}") from None


def _settle(pool: tc.Pool, run: Path, step: int) -> None:
    """Waits until the last save is in storage, and all others are gone."""

    def saves() -> list[tuple[str, str]]:
        return [(save.path.rpartition("/")[2], save.state) for save in pool.list_saves(f"file://{run}")]

    until(lambda: saves() == [(f"step-{step}", "durable")])
    until(lambda: [path.name for path in run.iterdir()] == [f"step-{step}"])
