"""What connections cost a server that nobody uses just now: memory, threads, descriptors."""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack
from typing import Final

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import WarmPool, local_pool, memory_folder, write_files
from benchmarks.processes import footprint
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.connections import Connections
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent
from torchcache.pool.control import ControlClient
from torchcache.pool.members import parse_address
from torchcache.wire.v1 import cache_pb2

CLIENTS: Final = 1000
TINY_CLIENTS: Final = 5
RECORD_BYTES: Final = 114_660
A_CALL_S: Final = 30.0
MOST_MB: Final = Goal(bound=100, of="value", sense="at most")
MOST_THREADS: Final = Goal(bound=64, of="value", sense="at most")
"""64 threads: what busy connections have anyway."""


def measure(scale: Scale) -> Findings:
    """Each client is one as `Pool` has them, with a control and a data connection, has read one record, and waits."""
    clients = TINY_CLIENTS if scale.tiny else CLIENTS
    _allow_descriptors(4 * clients + 500)
    with memory_folder() as root, ExitStack() as closing:
        write_files(root / "source", [RECORD_BYTES])
        warm = closing.enter_context(local_pool(root / "pool", capacity_bytes=1 << 29, own=True))
        tc.CachedDataset.from_files(root / "source", pool=warm.pool).stage(progress=False)
        extent = Extent(next(iter(warm.pool.list(f"file://{root / 'source'}"))))
        _connect(warm, extent, closing)  # the first makes the server warm
        before = footprint(warm.pids[0])
        for _ in range(clients):
            _connect(warm, extent, closing)
        time.sleep(0.0 if scale.tiny else 2.0)  # threads that were busy with the last calls go
        after = footprint(warm.pids[0])
    what = f"{clients:,} idle clients, a control and a data connection each"
    rows = [
        Row(
            what=f"{what}: memory of the server",
            unit="MB more",
            ours=max(0, after.rss_bytes - before.rss_bytes) / 1e6,
            goal=MOST_MB,
        ),
        Row(
            what=f"{what}: threads of the server",
            unit="more",
            ours=max(0, after.threads - before.threads),
            goal=MOST_THREADS,
        ),
        Row(
            what=f"{what}: open files of the server",
            unit="more",
            ours=max(0, after.descriptors - before.descriptors),
        ),
    ]
    return Findings(title="Idle connections", rows=rows)


def _connect(warm: WarmPool, extent: Extent, closing: ExitStack) -> None:
    """One more client. A registry of its own gives it connections of its own."""
    registry = Connections()
    endpoint = parse_address(warm.address)[0]
    access = warm.pool._source.access
    control = ControlClient(endpoint.address, access, registry)
    closing.callback(control.close)
    deadline = time.monotonic() + A_CALL_S
    info = control.call("GetInfo", cache_pb2.InfoRequest(), deadline=deadline)
    lane = FlightLane(
        endpoint.host, info.data_port, server=endpoint.address, access=access, registry=registry
    )
    closing.callback(lane.close)
    found = lane.read([extent], [None], ReadOptions(), deadline=deadline)[0]
    if not isinstance(found, memoryview):
        raise found


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
