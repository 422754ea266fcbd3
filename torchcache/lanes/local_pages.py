"""Pages of mapped files: brought into memory while other threads run, and how to know that they are still there.

Touching a page that isn't in memory stops every Python thread until the disk has answered, and ends the process by
SIGBUS if the disk can't. To ask for each record costs as much as to verify it. So it is asked for once, and again after
the kernel has taken pages from anybody: it says how many it took since it started.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import time
from typing import Final

from torchcache.records import PAGE_BYTES

LOOK_S: Final = 0.1
"""How often the kernel is asked at most. It takes pages that were not used for long first, not those just read."""

_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, Linux 5.14
_TAKEN: Final = re.compile(rb"^(?:pgsteal_anon|pgsteal_file|drop_pagecache) (\d+)$", re.MULTILINE)

_libc = ctypes.CDLL(None, use_errno=True)  # a call releases the interpreter lock
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def populate(address: int, size: int) -> None:
    """Brings `size` bytes of a mapping into memory. Raises OSError where the file or the disk has none.

    A kernel that can't (before Linux 5.14) is no error: the risk stays.
    """
    start = address - address % PAGE_BYTES
    while _madvise(start, address + size - start, _POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return
        if code == errno.EFAULT:  # its word for a page that can't be read
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


class Reclaim:
    """Tells whether the kernel took pages from anybody on this machine."""

    def __init__(self, path: str = "/proc/vmstat") -> None:
        self._path = path
        self._taken: list[bytes] | None = None
        self._looked_s = float("-inf")

    def happened(self) -> bool:
        """Whether it did since the last call that said so; always where the kernel doesn't tell."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        try:
            with open(self._path, "rb", buffering=0) as file:
                taken = _TAKEN.findall(file.read(1 << 16))
        except OSError:
            taken = []
        before, self._taken = self._taken, taken
        return not taken or taken != before
