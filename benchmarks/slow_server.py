"""What a read costs while one of several servers is a hundred times slower, and when one hangs or dies.

All servers are reached by way of a proxy, a process of its own, which makes one of them slow. Each time the clients are
new, have read while all was well, and have to find out: what that takes is part of what is measured.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import WarmPool, local_pool, memory_folder, write_files
from torchcache.model import Extent

RECORD_BYTES: Final = 114_660
BATCH: Final = 16
TIMES: Final = 100
"""How much slower the slow one is."""

_PROXY: Final = "127.0.0.2"
_PIECE_BYTES: Final = 1 << 18


class Measurement:
    """Readers of `files` records in a pool, whose server number 0 may be made slow."""

    def __init__(self, warm: WarmPool, proxy: subprocess.Popen[str], infos: Sequence[Extent]) -> None:
        self.warm = warm
        self._proxy = proxy
        self._infos = infos
        self.hedged = self.read = 0

    def delay(self, seconds: float) -> None:
        """From now on for every piece that goes to server 0."""
        if self._proxy.stdin is None:
            raise RuntimeError("the proxy can't be told")
        print(seconds, file=self._proxy.stdin, flush=True)

    def times_s(self, count: int, at: int = -1, harm: Callable[[], object] = lambda: None) -> list[float]:
        """Of `count` reads by a new client that has read as often before; `harm` is done before read number `at`."""
        pool = tc.connect(
            self.warm.address.replace("127.0.0.1", _PROXY), token=self.warm.token, lane="flight"
        )
        chance = random.Random(count)
        times = []
        for number in range(-count, count):
            if number == at:
                harm()
            extents = chance.sample(self._infos, BATCH)
            started = time.perf_counter()
            pool.read(extents)
            times.append(time.perf_counter() - started)
        seen = pool.statistics()
        self.hedged += seen.hedged_extents
        self.read += seen.extents
        pool.close()
        return times[count:]

    @contextmanager
    def stopped(self, pid: int) -> Iterator[Callable[[], None]]:
        """Within, what is given stops the process; afterwards it goes on."""
        try:
            yield lambda: os.kill(pid, signal.SIGSTOP)
        finally:
            os.kill(pid, signal.SIGCONT)


def measure(scale: Scale) -> Findings:
    """Rounds of reads with all servers well and with one slow, in turn; then one that hangs, then one that dies."""
    servers, files, count, rounds = (2, 32, 10, 1) if scale.tiny else (4, 512, 1000, min(scale.rounds, 5))
    well: list[list[float]] = []
    slow: list[list[float]] = []
    with (
        memory_folder() as root,
        local_pool(root / "pool", capacity_bytes=1 << 31, servers=servers, own=True) as warm,
    ):
        write_files(root / "source", [RECORD_BYTES] * files)
        dataset = tc.CachedDataset.from_files(root / "source", pool=warm.pool)
        dataset.stage(progress=False)
        infos = [Extent(info) for info in warm.pool.list(f"file://{root / 'source'}")]
        ports = [
            json.loads((root / f"pool/server-{number}/endpoint.json").read_text())
            for number in range(servers)
        ]
        with _proxy(ports) as proxy:
            work = Measurement(warm, proxy, infos)
            work.times_s(count)
            for _ in range(rounds):
                well.append(work.times_s(count))
                delay_s = TIMES * statistics.median(well[-1])
                slow.append(work.times_s(count, 0, partial(work.delay, delay_s)))
                work.delay(0.0)
            with work.stopped(warm.pids[1]) as stop:
                hung_s = max(work.times_s(count, count // 2, stop))
            killed_s = max(work.times_s(count, count // 2, lambda: os.kill(warm.pids[1], signal.SIGKILL)))
    what = f"a read of {BATCH} records of {RECORD_BYTES:,} bytes, one of {servers} servers {TIMES} x slow"
    against = "all servers well"
    rows = [
        Row(what=f"{what}: median", unit="ms", ours=_ms(slow, 50), bare=_ms(well, 50), against=against),
        Row(
            what=f"{what}: 99th percentile",
            unit="ms",
            ours=_ms(slow, 99),
            bare=_ms(well, 99),
            against=against,
            goal=Goal(bound=0.5),
        ),
        Row(
            what="the longest read when a server is killed",
            unit="s",
            ours=killed_s,
            goal=Goal(bound=1.0, of="value", sense="at most"),
        ),
        Row(
            what="the longest read when a server hangs (SIGSTOP)",
            unit="s",
            ours=hung_s,
            goal=Goal(bound=1.0, of="value", sense="at most"),
        ),
        Row(what="records asked for twice", unit="% of those read", ours=100 * work.hedged / work.read),
    ]
    details = {"well_ms": [_ms([one], 99) for one in well], "slow_ms": [_ms([one], 99) for one in slow]}
    return Findings(title="A slow server", rows=rows, details=details)


def _ms(rounds: Sequence[Sequence[float]], percentile: int) -> float:
    """The median of the rounds' percentiles."""
    return 1e3 * statistics.median(sorted(one)[len(one) * percentile // 100] for one in rounds)


@contextmanager
def _proxy(servers: Sequence[dict[str, object]]) -> Iterator[subprocess.Popen[str]]:
    """Stands before all ports of the servers, by the same numbers at another address."""
    ports = [str(server["control"]).rpartition(":")[2] for server in servers]
    ports += [str(server["data_port"]) for server in servers]
    delayed = str(servers[0]["data_port"])
    command = [sys.executable, "-m", "benchmarks.slow_server", delayed, *ports]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            if not process.stdout.readline():
                raise RuntimeError("the proxy did not start")
            yield process
        finally:
            process.terminate()


# ---- the proxy ----

_delays_s: dict[int, float] = {}
"""By port, for every piece."""


def _serve(port: int) -> None:
    listener = socket.create_server((_PROXY, port))

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", port))
            except OSError:
                client.close()
                continue
            for one, other in ((client, server), (server, client)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_forward, args=(one, other, port), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, port: int) -> None:
    try:
        while data := source.recv(_PIECE_BYTES):
            if delay_s := _delays_s.get(port, 0.0):
                time.sleep(delay_s)
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def main(delayed: int, ports: Sequence[int]) -> None:
    """Forwards the ports, and takes delays for one of them, a line each."""
    for port in ports:
        _serve(port)
    print("ready", flush=True)
    for line in sys.stdin:
        _delays_s[delayed] = float(line)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]])
