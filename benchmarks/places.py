"""Where benchmarks work: a folder in memory, files to read there, and pools that hold them already."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torchcache as tc

_MEMORY: Final = Path("/dev/shm")
_SHARED_BYTES: Final = 1 << 30


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder on tmpfs if there is one; gone afterwards."""
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="torchcache-bench-", dir=place) as folder:
        yield Path(folder)


def write_files(folder: Path, sizes: Sequence[int], *, seed: int = 0) -> list[Path]:
    """Files 00000, 00001, ... of random bytes, which no compression or page sharing makes easy."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:05d}"
        with path.open("wb") as file:
            for at in range(0, size, 1 << 24):
                file.write(chance.randbytes(min(1 << 24, size - at)))
        paths.append(path)
    return paths


Lane = Literal["local", "flight"]


@dataclass(frozen=True)
class WarmPool:
    """A pool, and the processes that serve it."""

    pool: tc.Pool
    address: str
    token: str
    pids: tuple[int, ...]

    def by_lane(self, lane: Lane | None) -> tc.Pool:
        """The same servers, by this lane alone; None is the best that works."""
        return tc.connect(self.address, token=self.token, lane=lane)


_shared: WarmPool | None = None


@contextmanager
def one_pool_for_all(root: Path) -> Iterator[None]:
    """Within, every `local_pool` that doesn't ask for one of its own is the same: tiny rounds are quick by it."""
    global _shared  # noqa: PLW0603 - the sections, in between, need not know
    with local_pool(root, capacity_bytes=_SHARED_BYTES) as pool:
        _shared = pool
        try:
            yield
        finally:
            _shared = None


@contextmanager
def local_pool(
    root: Path, *, capacity_bytes: int, servers: int = 1, lane: Lane | None = None, own: bool = False
) -> Iterator[WarmPool]:
    """An embedded pool in `root`. `lane` forces one; without it the pool takes the best that works.

    `own`: what is measured depends on its being new, on its size or on what S3 it knows.
    """
    if _shared is not None and not own and servers == 1:
        yield replace(_shared, pool=_shared.by_lane(lane))
        return
    local = tc.LocalPool(root, capacity=capacity_bytes, servers=servers, lane=lane)
    with local as pool:
        described = [root / f"server-{index}" / "endpoint.json" for index in range(servers)]
        pids = tuple(int(json.loads(path.read_text())["pid"]) for path in described)
        yield WarmPool(pool, local.address, (root / "token").read_text().strip(), pids)


@contextmanager
def home(folder: Path) -> Iterator[None]:
    """Lets torchcache keep its lists of files in `folder`, and not in the user's home."""
    before = os.environ.get("TORCHCACHE_HOME")
    os.environ["TORCHCACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHCACHE_HOME"]
        else:
            os.environ["TORCHCACHE_HOME"] = before
