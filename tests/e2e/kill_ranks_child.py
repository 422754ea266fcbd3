"""The ranks of test_rank_kills.py: each saves one checkpoint after the other until it is killed.

Run by a fork server that has done the imports. Each says "begun <step> <attempt>" before each save, and after it "saved
<step> <attempt>", with "alone" behind it where no second server took the save, or "failed <step> <attempt> <why>" where
it raised, in one write each.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchcache as tc

ROWS, COLUMNS = 512, 128
WORLD = 2


class Warnings(logging.Handler):
    """What the pool warned of since it was last asked."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def taken(self) -> str:
        texts, self._texts = self._texts, []
        return "\n".join(texts)


def content(step: int, attempt: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as one process holds them: every element tells the step and the attempt at it.

    But for "frozen", which never changes, and can be borrowed.
    """
    mark = step * 1000 + attempt
    places = torch.arange(ROWS * COLUMNS, dtype=torch.int64).reshape(ROWS, COLUMNS)
    return {
        "rows": places + (mark << 32),
        "plain": torch.full((20_000,), mark, dtype=torch.int64),
        "frozen": places.repeat(1, 4) * 0x9E3779B97F4A7C1,
    }


def main(
    rank: int, group: str, addresses: str, token: str, root: str, first: int, attempt: int, say: int
) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.init_process_group(
        "gloo", init_method=f"file://{group}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    pool = tc.connect(addresses, token=token)
    warnings = Warnings()
    logging.getLogger("torchcache").addHandler(warnings)

    def tell(*words: object) -> None:
        os.write(say, (" ".join(map(str, words)) + "\n").encode())

    for step in range(first, first + 1000):
        tensors = content(step, attempt)
        state: dict[str, Any] = {
            "rows": distribute_tensor(tensors["rows"], mesh, [Shard(0)]),
            "frozen": distribute_tensor(tensors["frozen"], mesh, [Shard(0)]),
            "plain": tensors["plain"],
            "mark": step * 1000 + attempt,
        }
        tell("begun", step, attempt)
        try:
            path = f"{root}/step-{step}"
            writer = tc.CacheStorageWriter(path, pool=pool, overwrite=True, reuse_unchanged=True)
            dcp.save(state, storage_writer=writer)
        except BaseException as error:
            tell("failed", step, attempt, repr(error)[:300].replace("\n", " "))
            time.sleep(0.05)
        else:
            alone = f"{path.rpartition('/')[2]} is safe on 1 server " in warnings.taken()
            tell("saved", step, attempt, *(["alone"] if alone else []))
