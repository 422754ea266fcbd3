"""Processes stopped for a while, and stopped when the call returns: a busy machine takes its time for a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import until


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Within, no thread of the process runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: _states(pid) == {"T"})
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> set[str]:
    try:
        return {
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        }
    except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
        return set()
