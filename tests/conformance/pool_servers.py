"""Some servers with one source, and pools of them: for the contract that holds at the pool whatever the lane."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.integration.pool_server import PoolServer
from tests.integration.self_describing import content
from torchcache.connecting import connect
from torchcache.model import ObjectInfo
from torchcache.pool import Pool
from torchcache.records import folder_name

PATIENCE_S = 60.0


class PoolServers:
    """`count` servers over one folder of sources. Context manager."""

    def __init__(self, folder: Path, count: int, *, capacity: str = "512MB") -> None:
        self._folder = folder
        self.servers = [
            PoolServer(folder, store=folder / f"store-{number}", capacity=capacity) for number in range(count)
        ]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def address(self) -> str:
        return ",".join(server.address for server in self.servers)

    def connect(self, lane: str, *, token: str | None = None) -> Pool:
        return connect(self.address, token=token or self.servers[0].token, lane=lane)

    # ---- what stands behind them ----

    def namespace(self, name: str) -> str:
        return f"file://{self.servers[0].source}/{name}"

    def make(self, key: str, size: int, *, generation: int = 0) -> ObjectInfo:
        """An object of the source, as `<dataset>/<name>`: self-describing bytes, in the place of what was there."""
        path = self.servers[0].source / key
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(content(key, generation, size))
        # Another version even where the clock is too coarse to tell.
        os.utime(beside, ns=(time.time_ns(), time.time_ns() + generation * 1_000_000_000))
        beside.rename(path)
        return self.servers[0].pool.stat(f"file://{path}")

    def remove(self, key: str) -> None:
        (self.servers[0].source / key).unlink()

    # ---- the disks under them ----

    def overwrite(self, namespace: str, data: bytes, at: int, by: bytes) -> None:
        """Writes `by` over the copy of `data` on disk, from its byte `at` on."""
        for path in sorted(self._folder.glob(f"store-*/segments/{folder_name(namespace)}/*.segment")):
            start = path.read_bytes().find(data)
            if start >= 0:
                with path.open("r+b") as file:
                    file.seek(start + at)
                    file.write(by)
                return
        raise AssertionError("no segment holds it")
