"""Which kernel this process runs on, and as one of whose processes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PIDS: Final = Path("/proc/self/ns/pid")


def kernel_id() -> str:
    """The same for two processes that share files, locks and process ids; empty where that can't be told.

    Only they may open one LMDB environment: its locks name processes by their ids, and its pages need one page cache.
    """
    try:
        return f"{_BOOT_ID.read_text().strip()} {_PIDS.readlink()}"
    except OSError:
        return ""
