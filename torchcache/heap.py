"""What glibc's malloc does with memory that was freed. Without effect where the C library is another.

*Kept for the next message*, so that the kernel need not clear its pages again. A Flight message of some MiB lands in
memory that gRPC takes from malloc. glibc gives blocks that large back to the kernel at once, or as soon as 4 MiB lie
free at the end of the heap; then the next message faults page after page, which costs more than receiving it. glibc
has a remedy of its own: when a large block is freed, it takes blocks up to that size from the heap from then on, and
keeps up to twice that size in it.

*Shared by threads.* Each thread that finds the heaps of others busy gets one of its own, up to eight a core, and what
was freed in one serves none of the others: a server's 50 threads held 65 MB so, for 20 in use.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from functools import cache
from typing import Final

_LARGEST: Final = 32 * 1024 * 1024 - 64 * 1024
"""Just below the largest block that glibc learns from: it then keeps up to 64 MiB of freed memory."""

_LOOKED_AT: Final = 128 * 1024
"""From 64 KiB on, freeing a block makes glibc look at how much is free at its heap's end."""

_HEAPS: Final = 4
_M_ARENA_MAX: Final = -8
_M_TRIM_THRESHOLD: Final = -1


@cache
def keep_freed_memory() -> None:
    """Shows glibc a large block, allocated, not touched, and freed; what that changes stays within its own bounds.

    Once is enough; forked children have learnt it too. Without effect for who chose by MALLOC_* variables or mallopt.
    """
    if not _is_glibc():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(_LARGEST))


def share_heaps() -> None:
    """Has the threads that begin from now on share a few heaps, unless MALLOC_ARENA_MAX says how many."""
    if _is_glibc() and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def give_back_freed_memory() -> None:
    """Gives the pages that nothing lies on back to the kernel, in milliseconds; who needs them next gets new ones.

    malloc_trim leaves the ends of all heaps but the first. Those are given back when a thread frees a large block in
    its heap, and more is free there than a bound: no less than 64 MiB, once glibc has learnt.
    """
    if not _is_glibc():
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    libc.mallopt(_M_TRIM_THRESHOLD, 0)
    try:
        _free_in_all_heaps(libc)
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)


def _free_in_all_heaps(libc: ctypes.CDLL) -> None:
    """New threads get the heaps that no other thread has, then all of them in turn."""
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    over = threading.Event()

    def free_one() -> None:
        libc.free(libc.malloc(_LOOKED_AT))
        over.wait()  # or the next would get the same heap

    threads: list[threading.Thread] = []
    try:
        for _ in range(2 * _HEAPS):
            thread = threading.Thread(target=free_one, name="heap", daemon=True)
            thread.start()
            threads.append(thread)
    finally:
        over.set()
        for thread in threads:
            thread.join()


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
