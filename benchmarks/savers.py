"""Who saves and loads a state, each through torch's own save and load: ours, and FileSystemWriter and -Reader."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch.distributed.checkpoint as dcp

import torchcache as tc
from benchmarks.places import local_pool
from benchmarks.states import State, size_of
from torchcache.model import SAVE_PREFIX

_UPLOAD_S: Final = 300.0

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is what we want


class Ours:
    """A CheckpointManager that keeps one checkpoint, over a pool of its own: each save replaces the one before."""

    def __init__(
        self, root: Path, state: State, into: State, *, home: str | None = None, reuse: bool = False
    ) -> None:
        """`home` is the URI that checkpoints are uploaded to (default: a folder in `root`); with it the pool is new.

        Without `reuse` a state that doesn't change is written whole at each save, as one that does would be.
        """
        self._root, self._state, self._into = root, state, into
        self._home = home or f"file://{root / 'store'}"
        self._own = home is not None or reuse
        self._reuse = reuse
        self._size = size_of(state)
        self._open = ExitStack()
        self._step = 0

    def __enter__(self) -> Ours:
        """Starts the pool, and asks it once: no save pays for a connection."""
        self._pool = self._open.enter_context(
            local_pool(self._root / "pool", capacity_bytes=4 * self._size + (1 << 29), own=self._own)
        ).pool
        manager = tc.CheckpointManager(
            self._home, keep_last=1, pool=self._pool, rng=False, reuse_unchanged=self._reuse
        )
        self._manager = self._open.enter_context(manager)
        self._pool.resolve(self._home)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start_anew(self) -> None:
        """With nothing that was saved before; may stand for entering."""
        self._own = True
        self._open.close()
        shutil.rmtree(self._root, ignore_errors=True)
        self.__enter__()

    def save(self) -> int:
        self._step += 1
        self._manager.save(self._step, self._state)
        return self._size

    def load(self) -> int:
        """The last one, as torch's own load does it."""
        reader = tc.CacheStorageReader(f"{self._manager.root}/step-{self._step}", pool=self._pool)
        dcp.load(self._into, storage_reader=reader, no_dist=True)
        return self._size

    @property
    def sent_bytes(self) -> int:
        """What was sent to the pool, by this process."""
        return self._pool.statistics().written_bytes

    @property
    def stored_bytes(self) -> int:
        """What of checkpoints lies in the pool."""
        return sum(
            namespace.bytes
            for server in self._pool.status()
            for namespace in server.namespaces
            if namespace.name.startswith(SAVE_PREFIX)
        )

    def begin_async(self) -> int:
        """Returns when training may go on."""
        self._step += 1
        self._saving = self._manager.save_async(self._step, self._state)
        return self._size

    def end_async(self) -> None:
        self._saving.result()
        self.settle()

    def settle(self) -> None:
        """Waits for the end of the upload, which would slow down whoever is next."""
        self._manager.wait_durable(self._step, timeout_s=_UPLOAD_S)


class Stock:
    """As torch has it, without fsync: a folder a save, and the one before goes when the next is there."""

    def __init__(self, root: Path, state: State, into: State) -> None:
        self._root, self._state, self._into = root, state, into
        self._number = 0

    def save(self) -> int:
        self._number += 1
        writer = dcp.FileSystemWriter(self._folder(self._number), sync_files=False)
        dcp.save(self._state, storage_writer=writer, no_dist=True)
        shutil.rmtree(self._folder(self._number - 1), ignore_errors=True)
        return size_of(self._state)

    def load(self) -> int:
        """What was saved last."""
        reader = dcp.FileSystemReader(self._folder(self._number))
        dcp.load(self._into, storage_reader=reader, no_dist=True)
        return size_of(self._state)

    def _folder(self, number: int) -> Path:
        return self._root / f"step-{number}"
