"""Small files of our own, read so that nothing that was put in their place leads elsewhere, or hangs who reads."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 20


def _opened(path: str, _flags: int) -> int:
    # Without O_NONBLOCK a FIFO that nobody writes to would be waited for.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_plain(path: Path) -> bytes:
    """All bytes of a regular file. Raises OSError: also for a symlink, a FIFO, and for more than `MAX_BYTES`."""
    with open(path, "rb", opener=_opened) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, "larger than such a file can be", str(path))
    return content
