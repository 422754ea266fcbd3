"""BufferPool: memory for samples that is used again once nobody uses it any more."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from typing import Final

import torch
from torch.utils.data import get_worker_info

from torchcache.data.memory import Lease, Memory, SharedMemory
from torchcache.errors import ConfigurationError
from torchcache.sizes import parse_size

DEFAULT_CAPACITY_BYTES: Final = 1_000_000_000
_LEAST_BYTES: Final = 4096
_WASTE: Final = 2
"""A piece serves what asks for at least its `_WASTE`th part."""

_MOST_PIECES: Final = 256
"""Each shared one is an open descriptor."""


class BufferPool:
    """Memory for samples, used again: fresh memory of the kernel costs more than copying a sample into it.

    A buffer is yours for as long as anything refers to it: the tensor of `take`, its views and slices, arrays and
    memoryviews over them. With the last of these it goes back to the pool by itself; until then it is not handed out
    again, nor written to. Only a raw address (`data_ptr()`) does not count.

    A pool never holds more than `capacity` bytes (text like "1GB", or a number), buffers in use included, in each
    process that uses it. What is asked for beyond that is fresh memory that is given back to the kernel after use:
    nothing waits, nothing fails. With `pin_memory` buffers are page-locked, for copies to a GPU that don't wait; they
    come from torch's own cache of such memory, which `capacity` does not bound.

    Threads share a pool. It pickles as its arguments, and each process, forked or spawned, begins with an empty one.
    What a process had in use at a fork stays valid on both sides. In a DataLoader's worker buffers are shared memory,
    which `torchcache.collate` sends to the process that trains, and gets back, without a copy.
    """

    def __init__(self, capacity: int | str = DEFAULT_CAPACITY_BYTES, *, pin_memory: bool = False) -> None:
        """Raises ConfigurationError for a bad capacity, or for `pin_memory` without CUDA."""
        self.capacity_bytes = parse_size(capacity)
        self.pin_memory = pin_memory
        if pin_memory and not torch.cuda.is_available():
            raise ConfigurationError("BufferPool(pin_memory=True) needs CUDA, and there is none here")
        self._shelf: _Shelf | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.capacity_bytes, self.pin_memory))

    def __repr__(self) -> str:
        pinned = ", pin_memory=True" if self.pin_memory else ""
        return f"BufferPool({self.capacity_bytes}{pinned})"

    def take(self, size_bytes: int) -> torch.Tensor:
        """A buffer of `size_bytes`: one dimension of uint8, contiguous, writable, its content whatever was there.

        `.numpy()` is it as an array, `memoryview(....numpy())` as what `Pool.read(into=)` takes. Raises
        ConfigurationError where pinned memory is asked for in a DataLoader's worker, which can't send it.
        """
        if self.pin_memory:
            if get_worker_info() is not None:
                raise ConfigurationError(
                    "pinned memory can't leave a DataLoader's worker: give the DataLoader pin_memory=True instead"
                )
            # torch reuses it no sooner than the copies to a GPU that were started from it are done.
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        if size_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._own_shelf().take(size_bytes), dtype=torch.uint8)

    @property
    def lent_bytes(self) -> int:
        """Bytes of this process's buffers that are in use and will come back to the pool."""
        return self._own_shelf().sizes()[0]

    @property
    def free_bytes(self) -> int:
        """Bytes of buffers kept by this process for the next who asks."""
        return self._own_shelf().sizes()[1]

    def _own_shelf(self) -> _Shelf:
        """This process's buffers. What a fork brought along belongs to whoever still uses it."""
        shelf = self._shelf
        if shelf is None or shelf.stale:
            shelf = self._shelf = _Shelf(self.capacity_bytes, shared=get_worker_info() is not None)
        return shelf


class _Forks:
    """How often this process forked, or was forked."""

    count = 0

    def forking(self) -> None:
        self.count += 1


_forks: Final = _Forks()
os.register_at_fork(before=_forks.forking, after_in_parent=_forks.forking, after_in_child=_forks.forking)

default_buffers: Final = BufferPool()
"""Where samples lie for which no pool was given."""


def _rebuild(capacity_bytes: int, pin_memory: bool) -> BufferPool:
    return BufferPool(capacity_bytes, pin_memory=pin_memory)


def room_for(size_bytes: int) -> int:
    """The size of the piece made for `size_bytes`: at most an eighth more, so that few sizes serve all."""
    step = max(_LEAST_BYTES, 1 << max(0, size_bytes.bit_length() - 4))
    return -(-size_bytes // step) * step


class _Shelf:
    """The buffers of one pool in one process. Thread-safe."""

    def __init__(self, capacity_bytes: int, *, shared: bool) -> None:
        self._pid = os.getpid()
        self._forks = _forks.count
        self._shared = shared
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._free: list[tuple[int, int, Memory]] = []  # by size; of equal ones the one that came back first
        self._returns = 0
        self._lent: dict[int, tuple[weakref.ref[Lease], Memory]] = {}
        self._lent_bytes = 0
        # Leases end anywhere, even inside this class's own methods where the garbage collector runs: so their end is
        # only noted, without a lock, and seen to by the next who asks.
        self._ended: deque[weakref.ref[Lease]] = deque()

    @property
    def stale(self) -> bool:
        """Whether another is needed: in a child, and where a child may still read what is shared with it."""
        return self._pid != os.getpid() or (self._shared and self._forks != _forks.count)

    def take(self, size_bytes: int) -> Lease:
        """A lease of `size_bytes`, which are more than 0."""
        with self._lock:
            self._collect()
            memory = self._fitting(size_bytes)
            if memory is None:
                room = room_for(size_bytes)
                if not self._make_room(room):
                    return Memory(room).lease(size_bytes)
                memory = self._made(room)
            lease = memory.lease(size_bytes)
            ended = weakref.ref(lease, self._ended.append)
            self._lent[id(ended)] = (ended, memory)
            self._lent_bytes += memory.size_bytes
            return lease

    def _made(self, size_bytes: int) -> Memory:
        if self._shared:
            try:
                return SharedMemory(size_bytes)
            except OSError:
                pass  # no descriptor is left: what lies here is sent as torch does it
        return Memory(size_bytes)

    def sizes(self) -> tuple[int, int]:
        """Bytes lent, and bytes free."""
        with self._lock:
            self._collect()
            return self._lent_bytes, self._free_bytes()

    def _collect(self) -> None:
        """Takes back what nobody uses any more."""
        while self._ended:
            _, memory = self._lent.pop(id(self._ended.popleft()))
            self._lent_bytes -= memory.size_bytes
            self._returns += 1
            bisect.insort(self._free, (memory.size_bytes, self._returns, memory))

    def _fitting(self, size_bytes: int) -> Memory | None:
        """The smallest free piece that is large enough, unless most of it would lie idle."""
        for at in range(bisect.bisect_left(self._free, (size_bytes,)), len(self._free)):
            size, _, memory = self._free[at]
            if size > max(_LEAST_BYTES, _WASTE * size_bytes):
                break
            if not memory.away:
                del self._free[at]
                return memory
        return None

    def _make_room(self, size_bytes: int) -> bool:
        """Whether so much more may be lent, once free pieces have made room, those unused longest first.

        Pieces that are away stay: the receiver may have yet to open them.
        """
        by_age = sorted((piece for piece in self._free if not piece[2].away), key=lambda piece: piece[1])
        spare = self._capacity_bytes - self._lent_bytes - self._free_bytes() - size_bytes
        pieces = len(self._free) + len(self._lent)
        if spare + sum(size for size, _, _ in by_age) < 0:
            return False
        for piece in by_age:
            if spare >= 0 and pieces < _MOST_PIECES:
                break
            self._free.remove(piece)
            spare += piece[0]
            pieces -= 1
        return spare >= 0 and pieces < _MOST_PIECES

    def _free_bytes(self) -> int:
        return sum(size for size, _, _ in self._free)
