"""What a pool serves by 1, 2, 4 and 8 servers of which each has the same share of a core, to enough clients.

On one machine, servers that may use all of it scale by nothing: they share its cores. With a quota each is a machine of
its own, a slow one, until the cores end which are there for servers and clients together.

A client's batch grows with the servers, so that a call to one of them stays as large as it was: more of all, as when a
job that grows is given more servers. What larger calls to one server give is shown beside it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torchcache as tc
from benchmarks.cpu_quotas import NoQuotas, cpu_quota
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import WarmPool, local_pool, memory_folder, write_files
from benchmarks.processes import cpu_s
from torchcache.model import Extent

RECORD_BYTES: Final = 114_660
BATCH_EACH: Final = 64
"""Records of a batch for each server."""

LARGE: Final = 256
CORES_EACH: Final = 0.12
CLIENTS: Final = 6
ROUND_S: Final = 6.0
WARM_UP_S: Final = 3.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the clients read from a pool in a while, and the cores that they and its servers used meanwhile."""

    gb_per_s: float
    server_cores: float
    client_cores: float
    twice: float  # of what was read the part that was asked of a second server, too


class Clients:
    """Processes that read batches of random records from the pool they are told, for as long as they are told."""

    def __init__(self, count: int, source: Path, closing: ExitStack) -> None:
        command = [sys.executable, "-m", "benchmarks.scaling", str(source)]
        self._processes = [closing.enter_context(_child(command)) for _ in range(count)]

    def read(self, warm: WarmPool, batch: int, seconds: float) -> Reading:
        """All of them, at the same time."""
        told = {"address": warm.address, "token": warm.token, "batch": batch}
        # They connect, learn how long answers take, and use up what they may ask for twice from the start.
        self._tell(told | {"seconds": min(seconds, WARM_UP_S)})
        before, began = cpu_s(warm.pids), time.monotonic()
        found = self._tell(told | {"seconds": seconds})
        took_s = time.monotonic() - began
        return Reading(
            gb_per_s=sum(one["bytes"] / one["took_s"] for one in found) / 1e9,
            server_cores=(cpu_s(warm.pids) - before) / took_s,
            client_cores=sum(one["cpu_s"] for one in found) / took_s,
            twice=sum(one["hedged"] for one in found) / sum(one["read"] for one in found),
        )

    def _tell(self, what: dict[str, Any]) -> list[dict[str, float]]:
        for process in self._processes:
            print(json.dumps(what), file=process.stdin, flush=True)
        return [json.loads(_line(process)) for process in self._processes]


def measure(scale: Scale) -> Findings:
    """Rounds over all pools in turn. Where there are no quotas nothing is measured, and the reason is said."""
    counts, files, clients = ((1, 2), 32, 1) if scale.tiny else ((1, 2, 4, 8), 4096, CLIENTS)
    rounds, round_s = (1, 0.1) if scale.tiny else (min(scale.rounds, 5), ROUND_S)
    cores_each = 1.0 if scale.tiny else CORES_EACH
    title = "More servers"
    try:
        with memory_folder() as root, ExitStack() as closing:
            write_files(root / "source", [RECORD_BYTES] * files)
            pools = {count: _pool(root, count, cores_each, closing) for count in counts}
            readers = Clients(clients, root / "source", closing)
            found: dict[int, list[Reading]] = {count: [] for count in counts}
            large: list[Reading] = []
            for _ in range(rounds):
                for count, warm in pools.items():
                    found[count].append(readers.read(warm, BATCH_EACH * count, round_s))
                large.append(readers.read(pools[1], LARGE, round_s))
    except NoQuotas as error:
        return Findings(title=title, rows=[Row(what=f"not measured: {error}", unit="", ours=0.0)])
    rates = {count: statistics.median(one.gb_per_s for one in readings) for count, readings in found.items()}
    rows = [_row(count, rates, cores_each, most=4) for count in counts]
    rows.append(
        Row(
            what=f"1 server, asked for {LARGE} records at a time",
            unit="GB/s",
            ours=statistics.median(one.gb_per_s for one in large),
            bare=rates[1],
            against=f"for {BATCH_EACH}",
            better="more",
        )
    )
    rows += [_cores(f"{count} servers", found[count]) for count in counts]
    rows.append(_cores(f"1 server, {LARGE} records at a time", large))
    twice = max(one.twice for readings in found.values() for one in readings)
    rows.append(Row(what="records asked for twice, at most", unit="% of those read", ours=100 * twice))
    batches = f"{clients} clients, batches of {BATCH_EACH} x {RECORD_BYTES:,} B for each server"
    note = f"{batches}. {_limit(found, cores_each)}"
    return Findings(title=title, rows=rows, note=note)


def _pool(root: Path, count: int, cores_each: float, closing: ExitStack) -> WarmPool:
    """Holds all files; each server has its quota from then on."""
    folder = root / f"pool-{count}"
    capacity_bytes = (1 << 30) + (count << 28)
    quotas = [closing.enter_context(cpu_quota(cores_each)) for _ in range(count)]
    warm = closing.enter_context(
        local_pool(folder, capacity_bytes=capacity_bytes, servers=count, lane="flight", own=True)
    )
    tc.CachedDataset.from_files(root / "source", pool=warm.pool).stage(progress=False)
    for put, pid in zip(quotas, warm.pids, strict=True):
        put(pid)
    return warm


def _row(count: int, rates: dict[int, float], cores_each: float, *, most: int) -> Row:
    """Beside as many times what one serves."""
    return Row(
        what=f"{count} servers of {cores_each:.2f} cores each",
        unit="GB/s",
        ours=rates[count],
        bare=count * rates[1],
        against=f"{count} x one",
        better="more",
        goal=Goal(bound=0.9) if 1 < count <= most else None,
    )


def _cores(who: str, readings: Sequence[Reading]) -> Row:
    rate = statistics.median(one.gb_per_s for one in readings)
    servers = statistics.median(one.server_cores for one in readings)
    clients = statistics.median(one.client_cores for one in readings)
    return Row(
        what=f"{who}: cores in use, clients' included",
        unit=f"of {os.cpu_count()}",
        ours=servers + clients,
        against=f"servers {servers:.2f}, which is {servers / rate:.2f} a GB/s; clients {clients:.2f}",
    )


def _limit(found: dict[int, list[Reading]], cores_each: float) -> str:
    """Where the cores end: what a gigabyte a second takes of them, at both ends, with the most servers that were tried.

    With fewer it was seen to take more.
    """
    readings = [one for one in found[max(found)] if one.gb_per_s]
    if not readings:
        return ""
    server, client = (
        statistics.median(cores / one.gb_per_s for one, cores in pairs)
        for pairs in (
            [(one, one.server_cores) for one in readings],
            [(one, one.client_cores) for one in readings],
        )
    )
    cores = os.cpu_count() or 1
    most = cores / (server + client)
    return (
        f"A GB/s takes {server:.2f} cores of servers and {client:.2f} of clients: the {cores} cores of this machine "
        f"end at {most:.1f} GB/s, from {most * server / cores_each:.0f} such servers. That is the limit here."
    )


# ---- a client ----


@contextmanager
def _child(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise RuntimeError("a client has ended")
    return line


def main(source: str) -> None:
    """Reads as each line of standard input says, and answers with bytes, seconds and seconds of CPU."""
    chance = random.Random(os.getpid())
    known: dict[str, tuple[tc.Pool, list[Extent]]] = {}
    for line in sys.stdin:
        told = json.loads(line)
        address = told["address"]
        if address not in known:
            pool = tc.connect(address, token=told["token"], lane="flight")
            known[address] = (pool, [Extent(info) for info in pool.list(f"file://{source}")])
        pool, extents = known[address]
        count = min(told["batch"], len(extents))
        into = [memoryview(bytearray(RECORD_BYTES)) for _ in range(count)]
        read, began, cpu_began = 0, time.monotonic(), time.process_time()
        before = pool.statistics()
        while True:
            read += sum(len(view) for view in pool.read(chance.sample(extents, count), into=into))
            took_s = time.monotonic() - began
            if took_s >= told["seconds"]:
                break
        seen = pool.statistics()
        said = {
            "bytes": read,
            "took_s": took_s,
            "cpu_s": time.process_time() - cpu_began,
            "read": seen.extents - before.extents,
            "hedged": seen.hedged_extents - before.hedged_extents,
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
