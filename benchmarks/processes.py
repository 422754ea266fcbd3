"""What the kernel says of other processes: CPU, memory, threads. And servers of the bare limits, as children."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of processes since they started, from /proc/<pid>/stat: in steps of 10 ms."""
    return sum(_cpu_ticks(pid) for pid in pids) / _TICKS_PER_S


def _cpu_ticks(pid: int) -> int:
    # The name in brackets may hold anything; user and system time are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@dataclass(frozen=True)
class Footprint:
    """A process's resident memory in bytes, its threads and its open descriptors."""

    rss_bytes: int
    threads: int
    descriptors: int


def footprint(pid: int) -> Footprint:
    """Of one process of ours, now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return Footprint(
        rss_bytes=int(values["VmRSS"].split()[0]) * 1024,
        threads=int(values["Threads"]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )


@dataclass(frozen=True)
class Child:
    """A server that runs as a child of this process, and the port it listens on."""

    pid: int
    port: int


@contextmanager
def server(module: str, *arguments: object) -> Iterator[Child]:
    """Runs `python -m module arguments`, which prints its port first; kills it at the end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Child(process.pid, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
