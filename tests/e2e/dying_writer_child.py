"""Saves one checkpoint and, at a named point of it, kills or stops itself: run by test_commit_outcomes.py.

Tells how the save ended, if it does.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from tests.e2e.named_points import Point, arm
from tests.integration.described_saves import save
from torchcache.checkpoint import CacheStorageWriter
from torchcache.connecting import connect
from torchcache.errors import TorchCacheError
from torchcache.pool.replicas import Replicas

POINTS: dict[str, Point] = {
    "reserved": (CacheStorageWriter, "write_data", "before"),
    "written": (CacheStorageWriter, "finish", "before"),
    "prepared": (Replicas, "prepare", "behind"),
    "committed": (Replicas, "confirm", "before"),
    "confirmed": (Replicas, "confirm", "behind"),
    "finished": (CacheStorageWriter, "finish", "behind"),
}
"""In their order."""


def main(
    addresses: str, token: str, uri: str, number: int, size: int, point: str, what: int, told: Connection
) -> None:
    arm(POINTS[point], lambda: os.kill(os.getpid(), what))
    try:
        save(connect(addresses, token=token), uri, number, size)
    except TorchCacheError as error:
        told.send(type(error).__name__)
    else:
        told.send("saved")
