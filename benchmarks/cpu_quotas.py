"""A share of a core for a process, by a control group of the kernel's, version 1 or 2."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PERIOD_US: Final = 100_000
"""The kernel's own, and that of containers. Shorter ones cost more: each start finds the processor's caches cold."""

REMOVE_S: Final = 10.0


class NoQuotas(Exception):
    """They can't be had here; says why."""


@contextmanager
def cpu_quota(cores: float) -> Iterator[Callable[[int], None]]:
    """Within, a process given by its pid, with all its threads, gets `cores` of a core at most. Raises NoQuotas."""
    hierarchy, quota = _hierarchy(cores)
    group = hierarchy / f"torchcache-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NoQuotas(f"no control group can be made in {hierarchy}: {error.strerror}") from error
    try:
        try:
            for name, value in quota:
                (group / name).write_text(value)
        except OSError as error:
            raise NoQuotas(f"{hierarchy} gives no share of a core: {error.strerror}") from error
        yield lambda pid: _put(group, pid)
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Its processes go back to where groups are made. Those that are just ending keep it for a moment."""
    deadline = time.monotonic() + REMOVE_S
    while True:
        try:
            for pid in (group / "cgroup.procs").read_text().split():
                _put(group.parent, int(pid))
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _put(group: Path, pid: int) -> None:
    try:
        (group / "cgroup.procs").write_text(str(pid))
    except ProcessLookupError:
        pass  # it has ended


def _hierarchy(cores: float) -> tuple[Path, list[tuple[str, str]]]:
    """Where groups can be made, and the files that limit one."""
    quota_us = round(cores * PERIOD_US)
    for mount, kind, options in _mounts():
        if kind == "cgroup" and "cpu" in options:
            return mount, [("cpu.cfs_period_us", f"{PERIOD_US}"), ("cpu.cfs_quota_us", f"{quota_us}")]
    for mount, kind, _ in _mounts():
        if kind == "cgroup2" and "cpu" in _controllers(mount):
            try:
                (mount / "cgroup.subtree_control").write_text("+cpu")
            except OSError as error:
                raise NoQuotas(f"{mount} doesn't hand on the controller cpu: {error.strerror}") from error
            return mount, [("cpu.max", f"{quota_us} {PERIOD_US}")]
    raise NoQuotas("no control groups with the controller cpu are mounted here")


def _controllers(mount: Path) -> list[str]:
    try:
        return (mount / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _mounts() -> Iterator[tuple[Path, str, list[str]]]:
    with open("/proc/self/mounts") as lines:
        for line in lines:
            _, where, kind, options, *_ = line.split()
            yield Path(where), kind, options.split(",")
