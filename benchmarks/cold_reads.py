"""The first epoch, from S3: ours beside the best parallel client of the same server, and its first sample beside a GET.

The server is SeaweedFS on this machine, with its files in memory, once as it is and once as if it were far away. Every
round of ours finds the pool empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any, Final

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import local_pool, memory_folder
from benchmarks.rounds import Result, alternate
from benchmarks.slow_network import far_away
from examples.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedFS, environment

OURS: Final = "torchcache"
ONE_GET: Final = "one GET, boto3"
_THREADS: Final = (16, 64)
"""Of the clients beside ours: more help where answers take long."""

_READERS: Final = 2

LATENCY_S: Final = 0.05
BYTES_S: Final = 200e6
"""Of an S3 that is far away: before each answer, and of all of them together."""


@dataclass(frozen=True)
class Shape:
    """`count` objects of `size` bytes, `batch` a request."""

    name: str
    size: int
    count: int
    batch: int


SHAPES: Final = (
    Shape("1,024 objects of 114,660 B", 114_660, 1024, 256),
    Shape("24 objects of 16 MiB", 1 << 24, 24, 8),
)
TINY: Final = (Shape("8 objects of 114,660 B", 114_660, 8, 4),)


@dataclass(frozen=True)
class Ground:
    """A bucket with the objects, and a pool that can read them."""

    name: str
    shape: Shape
    endpoint_url: str
    server: SeaweedFS
    bucket: str
    keys: list[str]
    pool: tc.Pool
    dataset: tc.CachedDataset
    storage_pids: tuple[int, ...]
    cache_pids: tuple[int, ...]

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/cold"

    def forget(self) -> None:
        """Makes the pool cold."""
        self.pool.evict(self.uri)


def measure(scale: Scale) -> Findings:
    """Small objects and large ones, of an S3 that is near and of one that is far away."""
    rows: list[Row] = []
    contenders: dict[str, list[Result]] = {}
    notes: list[str] = []
    for shape, far in product(TINY if scale.tiny else SHAPES, (False, True)):
        with _ground(shape, far=far) as found:
            with ThreadPoolExecutor(_READERS) as readers, _clients(found) as clients:
                epochs = alternate(
                    {OURS: _epoch(found, readers), **clients},
                    before={OURS: found.forget},
                    rounds=scale.rounds,
                    # Of the S3 server too: all share the machine's cores.
                    servers={
                        OURS: found.storage_pids + found.cache_pids,
                        **dict.fromkeys(clients, found.storage_pids),
                    },
                )
            firsts = alternate(
                {OURS: lambda: len(found.dataset[0]), ONE_GET: _one_get(found)},
                before={OURS: found.forget},
                rounds=scale.rounds,
            )
        best = min((r for name, r in epochs.items() if name != OURS), key=lambda r: r.median_s)
        rows += [
            _row(f"cold epoch of {found.name}", epochs[OURS], best, 0.9),
            _row(f"first of {found.name}", firsts[OURS], firsts[ONE_GET], 0.5),
        ]
        contenders[f"cold epoch of {found.name}"] = list(epochs.values())
        notes += [_cpu(found, epochs[OURS]), _cpu(found, best)]
    return Findings(title="The first epoch, from S3", rows=rows, contenders=contenders, note="; ".join(notes))


def _cpu(found: Ground, result: Result) -> str:
    """What a round takes of all processes."""
    took_s = (result.client_cpu_s + result.server_cpu_s) / result.rounds
    return f"CPU of {found.name}, S3's included: {result.name} {took_s / (result.bytes / 1e9):.2f} s/GB"


def _row(what: str, ours: Result, other: Result, goal: float) -> Row:
    return Row(
        what=what,
        unit="ms",
        ours=ours.median_s * 1e3,
        bare=other.median_s * 1e3,
        against=other.name,
        goal=Goal(bound=goal),
    )


@contextmanager
def _ground(shape: Shape, *, far: bool) -> Iterator[Ground]:
    with memory_folder() as root, ExitStack() as closing:
        server = closing.enter_context(SeaweedFS(root / "s3"))
        closing.enter_context(environment(server.environment()))
        bucket = server.make_bucket()
        keys = [f"cold/{number:05d}" for number in range(shape.count)]
        for key in keys:
            server.client.put_object(Bucket=bucket, Key=key, Body=os.urandom(shape.size))
        storage_pids = (server.process.pid,) if server.process is not None else ()
        url, name = server.endpoint_url, shape.name
        if far:
            url = closing.enter_context(far_away(url, latency_s=LATENCY_S, bytes_s=BYTES_S))
            closing.enter_context(environment({"AWS_ENDPOINT_URL": url}))
            name += ", far away"
        capacity_bytes = 2 * shape.size * shape.count + (1 << 28)
        warm = closing.enter_context(local_pool(root / "pool", capacity_bytes=capacity_bytes, own=True))
        # obstore hands out buffers of its own, not `bytes`.
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/cold", output="view", pool=warm.pool)
        yield Ground(name, shape, url, server, bucket, keys, warm.pool, dataset, storage_pids, warm.pids)


def _epoch(found: Ground, readers: ThreadPoolExecutor) -> Callable[[], int]:
    """A batch a call, two calls at a time, as two workers of a DataLoader make them."""
    shape = found.shape
    batches = [range(at, min(at + shape.batch, shape.count)) for at in range(0, shape.count, shape.batch)]
    return lambda: sum(readers.map(lambda batch: sum(map(len, found.dataset.__getitems__(batch))), batches))


@contextmanager
def _clients(found: Ground) -> Iterator[dict[str, Callable[[], int]]]:
    """Whoever reads all objects with as many threads as help: an object a GET, whole."""
    gets = {"boto3": _boto3_get(found)}
    if find_spec("obstore"):
        gets["obstore"] = _obstore_get(found)
    with ExitStack() as closing:
        clients = {}
        for count in _THREADS:
            threads = closing.enter_context(ThreadPoolExecutor(count))
            for name, get in gets.items():
                clients[f"{name}, {count} threads"] = _all_by(found.keys, threads, get)
        yield clients


def _all_by(keys: Sequence[str], threads: ThreadPoolExecutor, get: Callable[[str], int]) -> Callable[[], int]:
    return lambda: sum(threads.map(get, keys))


def _boto3_get(found: Ground) -> Callable[[str], int]:
    client: Any = found.server.make_client(found.endpoint_url)
    return lambda key: len(client.get_object(Bucket=found.bucket, Key=key)["Body"].read())


def _obstore_get(found: Ground) -> Callable[[str], int]:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        found.bucket,
        endpoint=found.endpoint_url,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return lambda key: len(obstore.get(store, key).bytes())


def _one_get(found: Ground) -> Callable[[], int]:
    get = _boto3_get(found)
    return lambda: get(found.keys[0])
