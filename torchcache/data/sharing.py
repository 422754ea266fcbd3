"""Tensors from a DataLoader's worker to the process that trains, in shared memory that goes back to be used again.

torch sends a tensor of a worker in shared memory of its own, fresh for each: the kernel clears every page, which costs
several times the copying. One that lies in a worker's buffer pool is sent as it is. The receiver opens the memory by
the worker's descriptor; when the last that refers to it there is gone, it says so in the memory's header, and the
worker may use it again.
"""

from __future__ import annotations

import mmap
import os
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from torchcache.data.memory import AWAY, HEADER_BYTES, TOKEN_BYTES, Lease, SharedMemory, lease_at
from torchcache.errors import TorchCacheError

_KEPT_BYTES: Final = 1_000_000_000


class _Place(NamedTuple):
    """Where a worker's piece of memory is found."""

    pid: int
    descriptor: int
    map_bytes: int
    token: bytes


class Shareable(torch.Tensor):
    """A tensor in shared memory of a buffer pool: a tensor as any other, that arrives elsewhere as a plain one."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def shareable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, so that it is sent as it is if it lies in shared memory of a pool; else unchanged."""
    return tensor if _memory(tensor) is None else tensor.as_subclass(Shareable)


def _memory(tensor: torch.Tensor) -> SharedMemory | None:
    lease = lease_at(tensor.untyped_storage().data_ptr())
    memory = None if lease is None else lease.memory
    return memory if isinstance(memory, SharedMemory) else None


def _reduce(tensor: Shareable) -> Any:
    memory = _memory(tensor)
    if memory is None or tensor.requires_grad or not memory.send():
        return reduce_tensor(tensor.as_subclass(torch.Tensor))  # type: ignore[no-untyped-call]
    place = _Place(os.getpid(), memory.descriptor, memory.map_bytes, memory.token)
    form = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
    return _receive, (place, form)


ForkingPickler.register(Shareable, _reduce)


def _receive(place: _Place, form: tuple[torch.dtype, int, torch.Size, Any]) -> torch.Tensor:
    lease = _received.open(place)
    storage = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
    dtype, offset, size, stride = form
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class _Received:
    """The pieces of other processes that are in use here, and the mappings of those that were.

    A worker sends the same pieces again and again, and to map one costs as much as to copy a fifth of it: so mappings
    are kept, up to `_KEPT_BYTES`. A fork brings what is in use into the child too, which may go on reading: that never
    goes back.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._in_use: dict[int, tuple[weakref.ref[Lease], _Place, mmap.mmap, int]] = {}
        self._idle: dict[_Place, mmap.mmap] = {}  # the one that was used last comes last
        self._senders: set[int] = set()

    def forking(self) -> None:
        """Before a fork, and after it in the parent: what was received in between is in both too."""
        self._generation += 1

    def forked(self) -> None:
        """In the child, which keeps nothing that it doesn't use."""
        self._generation += 1
        self._idle.clear()
        self._senders.clear()

    def open(self, place: _Place) -> Lease:
        memory = self._idle.pop(place, None)
        if memory is None:
            self._make_room(place)
            memory = _mapped(place)
        lease = Lease((place.map_bytes - HEADER_BYTES,), np.uint8, memory, HEADER_BYTES)
        ended = weakref.ref(lease, self._ended)
        self._in_use[id(ended)] = (ended, place, memory, self._generation)
        return lease

    def _ended(self, ended: weakref.ref[Lease]) -> None:
        """Runs wherever the last reference ends, inside `open` too."""
        _, place, memory, generation = self._in_use.pop(id(ended))
        if generation == self._generation:
            memory[AWAY] = 0
            self._idle[place] = memory

    def _make_room(self, new: _Place) -> None:
        """A new worker may have come in place of one that is gone, whose memory lives on in mappings of it."""
        if new.pid not in self._senders:
            self._senders = {pid for pid in self._senders if Path(f"/proc/{pid}").exists()} | {new.pid}
        spare = _KEPT_BYTES - new.map_bytes
        for place in reversed([*self._idle]):
            spare -= place.map_bytes
            if spare < 0 or place.pid not in self._senders:
                self._idle.pop(place, None)


def _mapped(place: _Place) -> mmap.mmap:
    gone = f"worker {place.pid} ended before its batch was taken"
    try:
        own = os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TorchCacheError(f"{gone}: {error}") from error
    try:
        memory = mmap.mmap(own, place.map_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(own)
    if memory[:TOKEN_BYTES] != place.token:
        raise TorchCacheError(gone)
    return memory


_received: Final = _Received()
os.register_at_fork(
    before=_received.forking, after_in_parent=_received.forking, after_in_child=_received.forked
)
