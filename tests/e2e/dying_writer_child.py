"""Saves one checkpoint and, at a named point of it, kills or stops itself: run by test_commit_outcomes.py.

Tells how the save ended, if it does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.integration.described_saves import save
from torchcache.checkpoint import CacheStorageWriter
from torchcache.connecting import connect
from torchcache.errors import TorchCacheError
from torchcache.pool.replicas import Replicas

POINTS: dict[str, tuple[type, str, str]] = {
    "reserved": (CacheStorageWriter, "write_data", "before"),
    "written": (CacheStorageWriter, "finish", "before"),
    "prepared": (Replicas, "prepare", "behind"),
    "committed": (Replicas, "confirm", "before"),
    "confirmed": (Replicas, "confirm", "behind"),
    "finished": (CacheStorageWriter, "finish", "behind"),
}
"""In their order: what is called, and on which side of it the point is."""


def arm(point: str, number: signal.Signals) -> None:
    kind, name, side = POINTS[point]
    original: Callable[..., Any] = getattr(kind, name)

    def armed(*arguments: Any, **named: Any) -> Any:
        if side == "before":
            os.kill(os.getpid(), number)
        result = original(*arguments, **named)
        if side == "behind":
            os.kill(os.getpid(), number)
        return result

    setattr(kind, name, armed)


def main(
    addresses: str, token: str, uri: str, number: int, size: int, point: str, what: int, told: Connection
) -> None:
    arm(point, signal.Signals(what))
    try:
        save(connect(addresses, token=token), uri, number, size)
    except TorchCacheError as error:
        told.send(type(error).__name__)
    else:
        told.send("saved")
