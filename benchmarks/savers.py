"""Who saves and loads a state, each through torch's own save and load: ours, and FileSystemWriter and -Reader."""

from __future__ import annotations

import shutil
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch.distributed.checkpoint as dcp

import torchcache as tc
from benchmarks.places import local_pool
from benchmarks.states import State, size_of

_POLL_S: Final = 0.02
_UPLOAD_S: Final = 300.0

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is what we want


class Ours:
    """Saves through a pool of its own, always at one path: a save replaces the one before once it is committed."""

    def __init__(self, root: Path, state: State, into: State) -> None:
        self._root, self._state, self._into = root, state, into
        self._size = size_of(state)
        self._open = ExitStack()
        self._path = f"file://{root / 'store' / 'run'}"

    def __enter__(self) -> Ours:
        """Starts the pool, and asks it once: no save pays for a connection."""
        capacity_bytes = 4 * self._size + (1 << 29)
        self._pool = self._open.enter_context(
            local_pool(self._root / "pool", capacity_bytes=capacity_bytes)
        ).pool
        self._place = self._pool.resolve(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start_anew(self) -> None:
        """With nothing that was saved before; may stand for entering."""
        self._open.close()
        shutil.rmtree(self._root, ignore_errors=True)
        self.__enter__()

    def save(self) -> int:
        dcp.save(self._state, storage_writer=self._writer(), no_dist=True)
        return self._size

    def load(self) -> int:
        reader = tc.CacheStorageReader(self._path, pool=self._pool)
        dcp.load(self._into, storage_reader=reader, no_dist=True)
        return self._size

    def begin_async(self) -> int:
        """Returns when training may go on."""
        self._saving = dcp.async_save(self._state, storage_writer=self._writer(), no_dist=True)
        return self._size

    def end_async(self) -> None:
        self._saving.result()
        self.settle()

    def settle(self) -> None:
        """Waits for the end of the upload, which would slow down whoever is next."""
        deadline = time.monotonic() + _UPLOAD_S
        while (info := self._pool.get_save(*self._place, manifest=False)).state != "durable":
            if info.state == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"{self._path} is {info.state}: {info.error}")
            time.sleep(_POLL_S)

    def _writer(self) -> tc.CacheStorageWriter:
        return tc.CacheStorageWriter(self._path, pool=self._pool, overwrite=True)


class Stock:
    """As torch has it, without fsync: a folder a save, and the one before goes."""

    def __init__(self, root: Path, state: State, into: State) -> None:
        self._root, self._state, self._into = root, state, into
        self._number = 0

    def save(self) -> int:
        writer = dcp.FileSystemWriter(self._folder(self._number), sync_files=False)
        dcp.save(self._state, storage_writer=writer, no_dist=True)
        return size_of(self._state)

    def settle(self) -> None:
        shutil.rmtree(self._folder(self._number - 1), ignore_errors=True)
        self._number += 1

    def load(self) -> int:
        """What was saved last."""
        reader = dcp.FileSystemReader(self._folder(self._number - 1))
        dcp.load(self._into, storage_reader=reader, no_dist=True)
        return size_of(self._state)

    def _folder(self, number: int) -> Path:
        return self._root / f"step-{number}"
