"""A client in a process of its own, told what to do line by line.

Its job says the pool's address and token, the folder of its store, the lane, and the user to become. Orders:

    "read"     all samples, and look at every byte: how many were right, how many came by the local lane
    "lane"     which lane there is, and why it isn't the local one
    "hold"     begin a transaction of the index and never end it
    "readers"  the processes that the index knows as readers
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grpc

from tests.integration.self_describing import difference
from torchcache.connecting import connect
from torchcache.errors import TorchCacheError
from torchcache.lanes.local_index import LocalIndex
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool


@dataclass(frozen=True)
class Job:
    """What to connect to, and as whom."""

    address: str
    token: str
    store: str
    sizes: list[int]
    lane: str = "auto"
    uid: int | None = None


def sample(number: int) -> ObjectId:
    return ObjectId("samples", f"local/{number}", "1")


NAMESPACE = "samples:local@1"


def read(pool: Pool, sizes: list[int]) -> int:
    """How many samples are right. Raises what the pool does."""
    extents = [Extent(ObjectInfo(sample(number), size)) for number, size in enumerate(sizes)]
    views = pool.read(extents, namespace=NAMESPACE)
    return sum(not difference(sample(number).key, 0, 0, view) for number, view in enumerate(views))


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    if job.uid is not None:
        grpc.insecure_channel(
            "localhost:1"
        ).close()  # imports more, from files that another user may not read
        os.setgroups([])
        os.setgid(job.uid)
        os.setuid(job.uid)
    pool = connect(job.address, token=job.token, lane=job.lane)
    held: list[Any] = []
    for line in sys.stdin:
        answer: dict[str, object] = {}
        try:
            match json.loads(line):
                case "read":
                    right = read(pool, job.sizes)
                    answer = {"right": right, "local": pool.statistics().local_extents}
                case "lane":
                    pool.status()
                    seen = pool.statistics()
                    answer = {"lane": seen.lanes[job.address], "reason": seen.lane_reasons[job.address]}
                case "hold":
                    index = LocalIndex(job.store)
                    held += [index, index.begin()]
                case "readers":
                    with closing(LocalIndex(job.store)) as index:
                        answer = {"pids": [int(line.split()[0]) for line in index.readers().splitlines()[1:]]}
        except TorchCacheError as error:
            answer = {"error": type(error).__name__, "message": error.message}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
