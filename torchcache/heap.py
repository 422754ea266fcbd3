"""Keeps freed memory for the next message, so that the kernel need not clear its pages again.

A Flight message of some MiB lands in memory that gRPC takes from malloc. glibc gives blocks that large back to the
kernel at once, or as soon as 4 MiB lie free at the end of the heap; then the next message faults page after page, which
costs more than receiving it. glibc has a remedy of its own: when a large block is freed, it takes blocks up to that
size from the heap from then on, and keeps up to twice that size in it.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Final

_LARGEST: Final = 32 * 1024 * 1024 - 64 * 1024
"""Just below the largest block that glibc learns from: it then keeps up to 64 MiB of freed memory."""


@cache
def keep_freed_memory() -> None:
    """Shows glibc a large block, allocated, not touched, and freed; what that changes stays within its own bounds.

    Once is enough; forked children have learnt it too. Without effect for who chose by MALLOC_* variables or mallopt,
    and where the C library isn't glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(_LARGEST))
