"""A disk that can only be read: what an inspection works on."""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

from torchcache_server.store.disk import DiskCalls


class ReadingDisk(DiskCalls):
    """The real calls for reading; those that would change anything raise OSError with EROFS."""

    def open(self, path: str) -> int:
        """Opens an existing file for reading; symlinks are refused, and no FIFO is waited for."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.EROFS, "an inspection changes nothing")

    make_dir = create = truncate = pwritev = deallocate = _refuse
    fsync = fsync_dir = rename = unlink = remove_dir = _refuse
