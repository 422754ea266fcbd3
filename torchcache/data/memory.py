"""Pieces of memory that samples lie in: of this process alone, or shared with the one that trains.

Nobody says when a piece is free; it is found out. What is handed out is a *lease*, an array over the piece, and every
view, array and tensor over it holds the lease: it ends with the last of them.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import Final

import numpy as np

from torchcache.mappings import new_memory

HEADER_BYTES: Final = mmap.PAGESIZE
TOKEN_BYTES: Final = 16
AWAY: Final = TOKEN_BYTES
"""Where in the header the receiver writes 0 when it no longer needs the piece."""


class Lease(np.ndarray):
    """The bytes of a piece of memory while somebody uses them. Can be referred to weakly."""

    memory: Memory


class Memory:
    """A piece of `size_bytes`, of this process alone. After a fork each side has its own."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = self._mapped()

    def _mapped(self) -> mmap.mmap:
        return new_memory(self.size_bytes)

    @property
    def away(self) -> bool:
        """Whether another process has it."""
        return False

    def lease(self, size_bytes: int) -> Lease:
        """The first `size_bytes` of it."""
        lease = Lease((size_bytes,), np.uint8, self._map, len(self._map) - self.size_bytes)
        lease.memory = self
        _leases[lease.ctypes.data] = lease
        return lease


class SharedMemory(Memory):
    """A piece that can be sent to another process as it is, and comes back once nothing there refers to it any more.

    It begins with a header of a page: a random token, by which the receiver knows that it opened the right one, and
    whether the piece is away.
    """

    descriptor = -1

    def _mapped(self) -> mmap.mmap:
        self.descriptor = os.memfd_create("torchcache", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.map_bytes)
        memory = mmap.mmap(self.descriptor, self.map_bytes)
        self.token = os.urandom(TOKEN_BYTES)
        memory[:TOKEN_BYTES] = self.token
        return memory

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @property
    def map_bytes(self) -> int:
        return HEADER_BYTES + self.size_bytes

    @property
    def away(self) -> bool:
        return self._map[AWAY] != 0

    def send(self) -> bool:
        """Whether it may be sent, which then counts as done: only once at a time."""
        with _sending:
            if self.away:
                return False
            self._map[AWAY] = 1
            return True


_sending: Final = threading.Lock()
_leases: Final[weakref.WeakValueDictionary[int, Lease]] = weakref.WeakValueDictionary()


def lease_at(address: int) -> Lease | None:
    """The lease that begins at `address`: whether memory is of a buffer pool, and which."""
    return _leases.get(address)
