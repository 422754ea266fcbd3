"""What travels over TCP: CachedDataset beside a bare socket, a grpcio stream and Arrow Flight alone, on loopback.

The bare socket comes once more with a checksum of each record behind its last byte: what verification costs where
bytes are received into their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from xxhash import xxh3_64_intdigest

from benchmarks.bare_files import buffers
from benchmarks.bare_flight import flight_client
from benchmarks.bare_grpc import grpc_client
from benchmarks.bare_socket import SocketClient, socket_client
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Shape, all_of, check, ground, objects_shape, reader, records_shape
from benchmarks.rounds import Result, alternate

OURS = "torchcache, flight lane"
SOCKET = "sendfile, recv_into"
HASHED = "sendfile, recv_into, xxh3"
GRPC = "grpcio, raw bytes"
FLIGHT_ONE = "bare Flight, a batch a record"
FLIGHT_VIEWS = "bare Flight, batches of views"

BESIDE_SOCKET = Goal(bound=0.75)
BESIDE_GRPC = Goal(bound=2.5)
SERVER_CPU = Goal(bound=0.25, of="value", sense="at most")


def measure(scale: Scale) -> Findings:
    """Records in batches; then large objects, one at a time, from one server and from two."""
    small, large = records_shape(scale), objects_shape(scale)
    records = _beside_all(small, scale.rounds)
    one = _beside_sockets(large, 1, scale.rounds)
    two = _beside_sockets(large, 2, scale.rounds)
    rows = [
        *_rows(f"batches of {small.name}", "us a record", records, small.count),
        *_rows(f"{large.name}, 1 server", "ms", one, large.count),
        *_rows(f"{large.name}, 2 servers", "ms", two, large.count),
        *(
            _cpu_row(what, found)
            for what, found in (
                (f"server CPU, {small.name}", records),
                (f"server CPU, {large.name}", one),
                (f"server CPU, {large.name}, 2 servers", two),
            )
        ),
    ]
    contenders = {
        small.name: list(records.values()),
        f"{large.name}, 1 server": list(one.values()),
        f"{large.name}, 2 servers": list(two.values()),
    }
    return Findings(title="Over the network", rows=rows, contenders=contenders)


def _beside_all(shape: Shape, rounds: int) -> dict[str, Result]:
    """Every round reads all records once, a batch a request, into the same buffers."""
    batches = shape.batches()
    into = buffers(shape.batch, shape.size)
    with ground(shape, lane="flight") as found, ExitStack() as clients:
        enter = clients.enter_context
        socket = enter(socket_client(found.flat, shape.size))
        grpc = enter(grpc_client(found.flat, shape.size))
        ours = reader(found, "numpy")
        check(found, ours)
        for bare in (socket, grpc):
            bare.read(batches[0], into)
            check(found, lambda batch: into[: len(batch)])
        one = enter(flight_client(found.flat, shape.size, "one"))
        views = enter(flight_client(found.flat, shape.size, "views"))
        return alternate(
            {
                OURS: all_of(shape, ours),
                SOCKET: lambda: sum(socket.read(batch, into) for batch in batches),
                HASHED: lambda: sum(socket.read(batch, into, xxh3_64_intdigest) for batch in batches),
                GRPC: lambda: sum(grpc.read(batch, into) for batch in batches),
                FLIGHT_ONE: lambda: sum(one.read(batch) for batch in batches),
                FLIGHT_VIEWS: lambda: sum(views.read(batch) for batch in batches),
            },
            rounds=rounds,
            servers={
                OURS: found.warm.pids,
                SOCKET: [socket.pid],
                HASHED: [socket.pid],
                GRPC: [grpc.pid],
                FLIGHT_ONE: [one.pid],
                FLIGHT_VIEWS: [views.pid],
            },
        )


def _beside_sockets(shape: Shape, servers: int, rounds: int) -> dict[str, Result]:
    """Of several bare servers each sends an equal part of every object, to a connection and thread of its own."""
    batches = shape.batches()
    into = buffers(1, shape.size)
    part = shape.size // servers
    with ground(shape, servers=servers, lane="flight") as found, ExitStack() as clients:
        enter = clients.enter_context
        sockets = [enter(socket_client(found.flat, part)) for _ in range(servers)]
        threads = enter(ThreadPoolExecutor(servers))
        ours = reader(found, "numpy")
        check(found, ours)
        bare = _in_parts(sockets, threads, into[0], part)
        return alternate(
            {
                OURS: all_of(shape, ours),
                SOCKET: lambda: (
                    sum(bare(batch[0]) for batch in batches) + shape.count * (shape.size % servers)
                ),
            },
            rounds=rounds,
            servers={OURS: found.warm.pids, SOCKET: [socket.pid for socket in sockets]},
        )


def _in_parts(
    sockets: Sequence[SocketClient], threads: ThreadPoolExecutor, into: memoryview, part: int
) -> Callable[[int], int]:
    def read(number: int) -> int:
        def one(place: int) -> int:
            return sockets[place].read(
                [number * len(sockets) + place], [into[place * part : (place + 1) * part]]
            )

        return sum(threads.map(one, range(len(sockets))))

    return read


def _rows(what: str, unit: str, results: dict[str, Result], count: int) -> list[Row]:
    scale = 1.0 if unit.startswith("us") else 1e-3
    goals = {SOCKET: BESIDE_SOCKET, GRPC: BESIDE_GRPC}
    return [
        Row(
            what=what,
            unit=unit,
            ours=us_each(results[OURS], count) * scale,
            bare=us_each(result, count) * scale,
            against=name,
            goal=goals.get(name),
        )
        for name, result in results.items()
        if name != OURS
    ]


def _cpu_row(what: str, results: dict[str, Result]) -> Row:
    return Row(
        what=what,
        unit="s/GB",
        ours=results[OURS].server_cpu_s_per_gb,
        bare=results[SOCKET].server_cpu_s_per_gb,
        against=SOCKET,
        goal=SERVER_CPU,
    )
