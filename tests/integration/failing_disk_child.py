"""A server whose store's disk fails as it is told to: `python -m torchcache_server` in all else.

Arguments: the file with the orders, then a server's. While the file is there it says an errno's name, and which calls
of `DiskCalls` meet it: "EIO pwritev fsync", or "EIO *" for all that can fail.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchcache_server.process import main as process
from torchcache_server.process.server import Server
from torchcache_server.store.disk import DiskCalls


class FailingDisk(DiskCalls):
    """The real disk, but for the calls that the orders name."""

    def __init__(self, orders: Path) -> None:
        self._orders = orders

    def meet(self, call: str) -> None:
        """Raises what a call is ordered to."""
        try:
            code, *calls = self._orders.read_text().split()
        except FileNotFoundError:
            return
        if call in calls or "*" in calls:
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number))


def _failing(name: str) -> Callable[..., Any]:
    real = getattr(DiskCalls, name)

    @functools.wraps(real)
    def call(disk: FailingDisk, *args: Any, **kwargs: Any) -> Any:
        disk.meet(name)
        return real(disk, *args, **kwargs)

    return call


for _name in vars(DiskCalls):
    if not _name.startswith("_") and _name != "close":
        setattr(FailingDisk, _name, _failing(_name))


if __name__ == "__main__":
    process.Server = functools.partial(Server, disk=FailingDisk(Path(sys.argv.pop(1))))  # type: ignore[misc, assignment]
    process.main(prog_name="torchcache serve")
