"""Pieces of memory that samples lie in.

Nobody says when a piece is free; it is found out. What is handed out is a *lease*, an array over the piece, and every
view, array and tensor over it holds the lease: it ends with the last of them.
"""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np

HUGE_BYTES: Final = 4 * 1024 * 1024
"""From here on the kernel is asked for huge pages: the first touch then costs a third."""


class Lease(np.ndarray):
    """The bytes of a piece of memory while somebody uses them. Can be referred to weakly."""


class Memory:
    """A piece of `size_bytes`, of this process alone. After a fork each side has its own."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size_bytes >= HUGE_BYTES:
            _ask_for_huge_pages(self._map)

    def lease(self, size_bytes: int) -> Lease:
        """The first `size_bytes` of it."""
        return Lease((size_bytes,), np.uint8, self._map)


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):
        pass  # a kernel without them: slower, not wrong
