"""Who reads or writes a save, for people."""

from __future__ import annotations

import os
import time


def holder_name() -> str:
    """Host, process and time."""
    return f"{os.uname().nodename} pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
