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
from typing import Any, Final

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from torchcache.data.memory import AWAY, HEADER_BYTES, TOKEN_BYTES, Lease, SharedMemory, lease_at
from torchcache.errors import TorchCacheError


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
    place = (os.getpid(), memory.descriptor, memory.map_bytes, memory.token)
    form = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
    return _receive, (place, form)


ForkingPickler.register(Shareable, _reduce)


def _receive(
    place: tuple[int, int, int, bytes], form: tuple[torch.dtype, int, torch.Size, Any]
) -> torch.Tensor:
    lease = _received.open(*place)
    storage = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
    dtype, offset, size, stride = form
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class _Received:
    """The pieces of other processes that are in use here.

    A fork brings them into the child too, which may go on reading: what was here then never goes back.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._pieces: dict[int, tuple[weakref.ref[Lease], mmap.mmap, int]] = {}

    def forking(self) -> None:
        """Before a fork, and after it on both sides: what was received in between is in both too."""
        self._generation += 1

    def open(self, pid: int, descriptor: int, map_bytes: int, token: bytes) -> Lease:
        try:
            own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TorchCacheError(f"worker {pid} ended before its batch was taken: {error}") from error
        try:
            memory = mmap.mmap(own, map_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(own)
        if memory[:TOKEN_BYTES] != token:
            raise TorchCacheError(f"worker {pid} ended before its batch was taken")
        lease = Lease((map_bytes - HEADER_BYTES,), np.uint8, memory, HEADER_BYTES)
        ended = weakref.ref(lease, self._ended)
        self._pieces[id(ended)] = (ended, memory, self._generation)
        return lease

    def _ended(self, ended: weakref.ref[Lease]) -> None:
        _, memory, generation = self._pieces.pop(id(ended))
        if generation == self._generation:
            memory[AWAY] = 0


_received: Final = _Received()
os.register_at_fork(
    before=_received.forking, after_in_parent=_received.forking, after_in_child=_received.forking
)
