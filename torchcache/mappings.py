"""Files mapped for reading, and their pages brought into memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_PROT_READ: Final = 1
_MAP_SHARED: Final = 1
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, Linux 5.14
_PAGE: Final = mmap.PAGESIZE
_LARGE_BYTES: Final = 16 * _PAGE  # what one fault maps

HUGE_BYTES: Final = 4 * 1024 * 1024
"""From here on the kernel is asked for huge pages: the first touch then costs a third."""

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the interpreter lock
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_mincore = _libc.mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


class Mapping:
    """A file's first `size` bytes, mapped read-only and shared. Outlives the descriptor and the file's name.

    It is unmapped with its last reference; buffers made of it (`pyarrow.foreign_buffer`) must hold one. Not
    `mmap.mmap`, which keeps a descriptor open for every mapping before Python 3.13: some thousand segments would meet
    the limit of open files.
    """

    def __init__(self, fd: int, size: int, released: Callable[[], object] | None = None) -> None:
        """Raises OSError. `released` is called at the end, in any thread and at any point: it may take no lock."""
        self.size = size
        self.is_own = os.fstat(fd).st_uid == os.geteuid()
        """Whether the kernel tells this process which pages are in memory: it is the file's owner."""
        self._released = released
        self._unmap = _libc.munmap  # still reachable while the interpreter is torn down
        address: int | None = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, fd, 0)
        self._mapped = address is not None and address != _MAP_FAILED
        if address is None or not self._mapped:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address = address

    def __del__(self) -> None:
        if self._mapped:
            self._unmap(self.address, self.size)
            if self._released is not None:
                self._released()


def populate(address: int, size: int, *, may_ask: bool = True) -> None:
    """Brings `size` bytes of a mapping into memory, other threads running meanwhile.

    `may_ask`: the file is this process's user's own, or one that it may write to. Of all others the kernel says that
    everything is in memory, so nothing would be brought there: pass `Mapping.is_own` of files that came from elsewhere.
    Raises OSError with EIO for what the disk can't read, or the file doesn't have: touching such a page would end the
    process by SIGBUS. Does nothing before Linux 5.14: the risk stays.
    """
    start, end = address - address % _PAGE, address + size
    # To ask costs a third of mapping them page by page, and a fiftieth where they are mapped already. Of a file that
    # was cut off the page cache may still have what is behind its new end: the last page is tried all the same.
    if may_ask and size >= _LARGE_BYTES and _are_in_memory(start, end - start):
        start = (end - 1) // _PAGE * _PAGE
    while _madvise(start, end - start, _POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return
        if code == errno.EFAULT:  # its word for a page that can't be read
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def new_memory(size: int) -> mmap.mmap:
    """Zeros of this process alone, of huge pages if it is large. After a fork each side has its own."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_BYTES:
        with suppress(OSError):  # a kernel without them: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _are_in_memory(start: int, size: int) -> bool:
    """Whether the page cache has all pages of a mapped range; False also where that can't be told.

    The kernel tells it to whoever owns the file or may write to it. To others it says that all are.
    """
    pages = -(-size // _PAGE)
    found = ctypes.create_string_buffer(pages)
    return _mincore(start, size, found) == 0 and found.raw.count(1) == pages
