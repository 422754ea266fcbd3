"""One of two ranks that save one checkpoint together: run by test_two_rank_outcomes.py.

At a named point of its save it kills or stops itself, or says so and waits to be told to go on. Tells how its save
ended, if it does. A commit may be made to come twice.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.e2e.named_points import Point, arm
from tests.integration.described_saves import state_of
from torchcache.checkpoint import CacheStorageWriter
from torchcache.connecting import connect
from torchcache.pool import Pool, SaveInfo
from torchcache.pool.replicas import Replicas

WORLD = 2

Act = Literal["kill", "stop", "wait", "twice"]

POINTS: dict[str, Point] = {
    "planned": (CacheStorageWriter, "prepare_global_plan", "behind"),
    "reserved": (CacheStorageWriter, "write_data", "before"),
    "half-written": (Pool, "write", "behind"),
    "written": (CacheStorageWriter, "write_data", "behind"),
    "gathered": (CacheStorageWriter, "finish", "before"),
    "prepared": (Replicas, "prepare", "behind"),
    "committed": (Replicas, "confirm", "before"),
    "finished": (CacheStorageWriter, "finish", "behind"),
}
"""In their order. "half-written" is after the first of two files of a rank; from "gathered" on all is the coordinator's
alone."""


@dataclass(frozen=True)
class Job:
    """What the ranks of one job have in common."""

    addresses: str
    token: str
    uri: str
    number: int
    size: int
    group: str


def main(job: Job, rank: int, point: str, act: Act, pipe: Connection) -> None:
    """`point` is "" for a rank that just saves. Sends "at" where it waits, then how the save ended."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.group}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=300),
    )
    if act == "twice":
        _commit_twice()
    elif point:
        _arm(POINTS[point], act, pipe)
    how = _save(job)
    gc.collect()  # a writer that nobody has any more gives back the path of a save that failed
    pipe.send(how)
    pipe.recv()  # whoever ends takes the connections of the other with it


def _save(job: Job) -> str:
    """How it ended."""
    # Each tensor is a file of its own: no two fit what may be copied at a time.
    writer = CacheStorageWriter(job.uri, pool=connect(job.addresses, token=job.token), extra_memory_bytes=1)
    state = {f"{name}-{part}": value for part in range(2) for name, value in _tensors(job).items()}
    try:
        dcp.save({**state, "number": job.number}, storage_writer=writer)
    except dcp.CheckpointException as failed:
        return " ".join(sorted({type(failure[0]).__name__ for failure in failed.failures.values()}))
    except BaseException as error:
        return type(error).__name__
    return "saved"


def _tensors(job: Job) -> dict[str, torch.Tensor]:
    described = state_of(job.uri, job.number, job.size)
    return {name: described[name] for name in ("large", "small")}


def _arm(point: Point, act: Act, pipe: Connection) -> None:
    once = threading.Lock()  # several threads write

    def reach() -> None:
        if not once.acquire(blocking=False):
            return
        if act == "wait":
            pipe.send("at")
            pipe.recv()
        else:
            os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGSTOP)

    arm(point, reach)


def _commit_twice() -> None:
    """As when the answer to the first was lost."""
    commit = Pool.commit_save

    def twice(pool: Pool, *where: str, **what: Any) -> SaveInfo:
        commit(pool, *where, **what)
        return commit(pool, *where, **what)

    Pool.commit_save = twice
