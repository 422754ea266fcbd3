"""States to save, and what raw system calls need to write and read the same bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

State = dict[str, torch.Tensor]


def large_state(count: int, size: int) -> State:
    """`count` matrices of `size` bytes, as layers have them."""
    chance = torch.Generator().manual_seed(0)
    return {
        f"layers.{number:03d}.weight": torch.rand((size // 4096, 1024), generator=chance)
        for number in range(count)
    }


def small_state(count: int) -> State:
    """Many tensors of 4 to 4,096 bytes."""
    chance = random.Random(0)
    return {
        f"steps.{number:05d}": torch.full((chance.randint(1, 1024),), float(number))
        for number in range(count)
    }


def size_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def cleared(state: State) -> State:
    """Tensors of the same shapes, their memory in use, to load into."""
    return {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}


def check(found: State, saved: State) -> None:
    """Raises RuntimeError unless they are equal."""
    for name, tensor in saved.items():
        if not torch.equal(found[name], tensor):
            raise RuntimeError(f"{name} isn't what was saved")


class RawFile:
    """A state's bytes in one file, by pwrite and preadv of whole tensors, on some threads: no format, no check."""

    def __init__(
        self, path: Path, state: State, into: State, threads: ThreadPoolExecutor, *, sync: bool = False
    ) -> None:
        self._path, self._threads, self._sync = path, threads, sync
        self._state, self._into = state, into
        self._size = size_of(state)

    def write(self) -> int:
        """Into the file, a new one if it isn't there; its pages are used again if it is."""
        self._each(os.O_WRONLY | os.O_CREAT, os.pwrite, self._state)
        return self._size

    def read(self) -> int:
        """Into memory that is used again."""
        self._each(os.O_RDONLY, _preadv, self._into)
        return self._size

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _each(self, flags: int, call: Callable[[int, memoryview, int], int], state: State) -> None:
        file = os.open(self._path, flags, 0o600)
        try:
            views, at, places = [memoryview(t.numpy()).cast("B") for t in state.values()], 0, []
            for view in views:
                places.append(at)
                at += len(view)
            done = list(self._threads.map(call, [file] * len(views), views, places))
            if done != [len(view) for view in views]:
                raise RuntimeError("a call moved less than was asked for")
            if self._sync:
                os.fsync(file)
        finally:
            os.close(file)


def _preadv(file: int, view: memoryview, at: int) -> int:
    return os.preadv(file, [view], at)


@contextmanager
def two_threads() -> Iterator[ThreadPoolExecutor]:
    """As many as the raw figures of the design were measured with."""
    with ThreadPoolExecutor(2) as threads:
        yield threads
