"""Takes turns between contenders, so that a machine's moods hit all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from benchmarks.processes import cpu_s


@dataclass(frozen=True)
class Result:
    """Median and extremes of one contender's rounds, in seconds, and the bytes a round moves.

    `client_cpu_s` and `server_cpu_s` are of all rounds together; 0.0 of servers that weren't named.
    """

    name: str
    median_s: float
    fastest_s: float
    slowest_s: float
    bytes: int
    rounds: int = 1
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes / self.median_s / 1e9

    @property
    def server_cpu_s_per_gb(self) -> float:
        return self.server_cpu_s / (self.bytes * self.rounds / 1e9)

    @property
    def client_cpu_s_per_gb(self) -> float:
        return self.client_cpu_s / (self.bytes * self.rounds / 1e9)


@dataclass
class _Tally:
    times: list[float] = field(default_factory=list)
    moved: int = 0
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0


def alternate(
    contenders: Mapping[str, Callable[[], int]],
    *,
    rounds: int,
    warm_up: int = 1,
    servers: Mapping[str, Sequence[int]] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
    after: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Result]:
    """Runs each contender once a round, in turn. A contender does its work and returns the bytes it moved.

    `servers` names, a contender, the processes whose CPU is counted as its servers'. `before` and `after` are done
    around a contender's rounds, outside the clock. A round moves its bytes whole: a
    contender that returns another number than before is a mistake.
    """
    pids, prepare, tidy = servers or {}, before or {}, after or {}
    tallies = {name: _Tally() for name in contenders}
    for number in range(warm_up + rounds):
        for name, work in contenders.items():
            tally = tallies[name]
            prepare.get(name, _nothing)()
            server_before = cpu_s(pids.get(name, ()))
            client_before, started = time.process_time(), time.perf_counter()
            moved = work()
            took, client_took = time.perf_counter() - started, time.process_time() - client_before
            if number and moved != tally.moved:
                raise RuntimeError(f"{name!r} moved {moved} bytes, and {tally.moved} in the round before")
            tally.moved = moved
            if number >= warm_up:
                tally.times.append(took)
                tally.client_cpu_s += client_took
                tally.server_cpu_s += cpu_s(pids.get(name, ())) - server_before
            tidy.get(name, _nothing)()
    return {name: _result(name, tally) for name, tally in tallies.items()}


def _nothing() -> None:
    pass


def _result(name: str, tally: _Tally) -> Result:
    times = tally.times
    return Result(
        name=name,
        median_s=statistics.median(times),
        fastest_s=min(times),
        slowest_s=max(times),
        bytes=tally.moved,
        rounds=len(times),
        client_cpu_s=tally.client_cpu_s,
        server_cpu_s=tally.server_cpu_s,
    )


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
