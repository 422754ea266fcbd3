"""Takes turns between contenders, so that a machine's moods hit all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Result:
    """Median and extremes of one contender's rounds, in seconds, and the bytes a round moves."""

    name: str
    median_s: float
    fastest_s: float
    slowest_s: float
    bytes: int

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes / self.median_s / 1e9


def alternate(
    contenders: Mapping[str, Callable[[], int]], *, rounds: int, warm_up: int = 1
) -> dict[str, Result]:
    """Runs each contender once a round, in turn. A contender does its work and returns the bytes it moved."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    moved = dict.fromkeys(contenders, 0)
    for number in range(warm_up + rounds):
        for name, work in contenders.items():
            started = time.perf_counter()
            moved[name] = work()
            if number >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {
        name: Result(name, statistics.median(taken), min(taken), max(taken), moved[name])
        for name, taken in times.items()
    }


def machine() -> dict[str, str]:
    """Hardware and versions, to stand beside every result."""
    packages = ("torchcache", "torch", "pyarrow", "grpcio", "lmdb", "xxhash")
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
