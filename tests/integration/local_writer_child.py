"""A client of another process that writes one object, and is stopped or killed by itself at a given point of it.

Its job says where the pool is and what to write. It goes on writing once it is continued, and prints what came of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tests.integration.self_describing import content
from torchcache.connecting import connect
from torchcache.errors import TorchCacheError
from torchcache.lanes.record_writing import FileCalls
from torchcache.model import ObjectId

MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """`signal` is sent to this process itself when it has made `after` calls named `call` to the store's files."""

    address: str
    token: str
    key: str
    size: int
    signal: str = ""
    call: str = "pwritev"
    after: int = 0
    timeout_s: float = 240.0


def object_id(key: str) -> ObjectId:
    return ObjectId("samples", key, "1")


def namespace(key: str) -> str:
    return f"samples:{key}@1"


def interrupt(job: Job) -> None:
    """Lets the signal come in the midst of the write."""
    real = getattr(FileCalls, job.call)
    made = 0

    def call(self: FileCalls, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == job.after + 1:
            print(json.dumps({"interrupted": made}), flush=True)
            os.kill(os.getpid(), signal.Signals[job.signal])
        return real(self, *arguments)

    setattr(FileCalls, job.call, call)


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    if job.signal:
        interrupt(job)
    with closing(connect(job.address, token=job.token, lane="local")) as pool:
        try:
            data = content(job.key, 0, job.size)
            pool.write(
                namespace(job.key), [(object_id(job.key), [data])], durable=True, timeout_s=job.timeout_s
            )
            outcome = "written"
        except TorchCacheError as error:
            outcome = type(error).__name__
        print(json.dumps({"outcome": outcome, "local_writes": pool.statistics().local_writes}), flush=True)


if __name__ == "__main__":
    main()
