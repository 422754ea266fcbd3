"""MLPerf Storage v2.0's workloads on one machine: how busy storage keeps simulated accelerators, and how many of them.

Everything runs on this machine: the servers' CPU, S3's and the accelerators' own readers'.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torchcache as tc
from benchmarks.accelerators import Run, lowest_utilisation
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.mlperf_readers import Kind
from benchmarks.mlperf_shapes import RESNET50, WORKLOADS, Workload, tiny
from benchmarks.mlperf_sources import CachedSource, FileSource, S3Source, Source
from benchmarks.places import Lane, local_pool, memory_folder, write_files
from examples.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedFS

OURS: Final[Mapping[str, Lane]] = {"torchcache, local lane": "local", "torchcache, flight lane": "flight"}
FILES: Final = "plain local files, preadv"
S3: Final = "straight from S3"
MOST_RUNS: Final = 3


@dataclass(frozen=True)
class Ground:
    """One workload's files, and what reads them; S3 is read by processes, as boto3 would hold threads up."""

    workload: Workload
    sizes: list[int]
    sources: dict[str, tuple[Source, Kind]]

    def utilisation(self, name: str, accelerators: int) -> float:
        source, reader = self.sources[name]
        return lowest_utilisation(
            Run(
                workload=self.workload,
                sizes=self.sizes,
                source=source,
                accelerators=accelerators,
                reader=reader,
            )
        )


def measure(scale: Scale) -> Findings:
    """Each workload over each source: at the number of accelerators that is asked for, and how many it feeds."""
    rows: list[Row] = []
    details = {}
    for workload in (tiny(RESNET50),) if scale.tiny else WORKLOADS:
        with ground(workload) as found:
            utilisations = _taking_turns(found, min(scale.rounds, MOST_RUNS))
            most = {name: most_accelerators(found, name, utilisations[name]) for name in found.sources}
        rows += _rows(workload, utilisations, most)
        details[workload.name] = {
            "bytes": sum(found.sizes),
            "files": len(found.sizes),
            "steps": workload.steps,
            "utilisation": utilisations,
            "most_accelerators": most,
        }
    note = "; ".join(
        f"{name}: {one['files']} files, {one['bytes'] / 1e9:.1f} GB, {one['steps']} steps"
        for name, one in details.items()
    )
    return Findings(title="MLPerf Storage v2.0 workloads", rows=rows, details=details, note=f"{note}.")


@contextmanager
def ground(workload: Workload) -> Iterator[Ground]:
    """The files in memory, in a pool that has staged them, and in a bucket of a real S3 server."""
    with memory_folder() as root, ExitStack() as closing:
        sizes = workload.file_sizes()
        paths = write_files(root / "source", sizes)
        bucket = _bucket(root / "s3", paths, closing)
        namespace = f"file://{root / 'source'}"
        sources: dict[str, tuple[Source, Kind]] = {}
        local = local_pool(root / "pool", capacity_bytes=2 * sum(sizes) + (1 << 28))
        warm = closing.enter_context(local)
        tc.CachedDataset.from_files(namespace, pool=warm.pool).stage(progress=False)
        for name, lane in OURS.items():
            dataset = _dataset(workload, namespace, warm.by_lane(lane))
            sources[name] = CachedSource(dataset, workload.samples_a_file), "threads"
        sources[FILES] = FileSource(paths), "threads"
        sources[S3] = bucket, "processes"
        yield Ground(workload, sizes, sources)


def _dataset(workload: Workload, uri: str, pool: tc.Pool) -> tc.CachedDataset:
    """Samples as arrays, in buffers for as many as an accelerator has under way, and some to spare."""
    record_bytes = workload.sample_bytes if workload.samples_a_file > 1 else None
    under_way = workload.slots * workload.batch * (workload.sample_bytes + workload.stdev_bytes)
    return tc.CachedDataset.from_files(
        uri, record_bytes=record_bytes, output="numpy", buffers=tc.BufferPool(under_way), pool=pool
    )


def _bucket(folder: Path, paths: Sequence[Path], closing: ExitStack) -> S3Source:
    server = closing.enter_context(SeaweedFS(folder))
    bucket = server.make_bucket()
    for path in paths:
        server.client.upload_file(str(path), bucket, path.name)
    settings = {
        "endpoint_url": server.endpoint_url,
        "aws_access_key_id": ACCESS_KEY,
        "aws_secret_access_key": SECRET_KEY,
        "region_name": "us-east-1",
    }
    return S3Source(settings, bucket, [path.name for path in paths])


def _taking_turns(found: Ground, rounds: int) -> dict[str, float]:
    """The median utilisation of the accelerators that are to be fed."""
    figures: dict[str, list[float]] = {name: [] for name in found.sources}
    for _ in range(rounds):
        for name, taken in figures.items():
            taken.append(found.utilisation(name, found.workload.accelerators))
    return {name: statistics.median(taken) for name, taken in figures.items()}


def most_accelerators(found: Ground, name: str, known: float) -> int:
    """The largest number that stays above the workload's utilisation: doubled until one fails, then halved in between.

    `known` is the utilisation of the number that is asked for. 0 if not even one is fed.
    """
    workload = found.workload

    def enough(accelerators: int) -> bool:
        asked = accelerators == workload.accelerators
        return (known if asked else found.utilisation(name, accelerators)) >= workload.least_utilisation

    fed, failed = 0, workload.most + 1
    while fed < workload.most:
        tried = min(max(1, 2 * fed), workload.most)
        if not enough(tried):
            failed = tried
            break
        fed = tried
    while failed - fed > 1:
        middle = (fed + failed) // 2
        if enough(middle):
            fed = middle
        else:
            failed = middle
    return fed


def _rows(workload: Workload, utilisations: Mapping[str, float], most: Mapping[str, int]) -> list[Row]:
    goal = Goal(bound=100 * workload.least_utilisation, of="value")
    counted = f"{workload.accelerators} accelerator{'s' if workload.accelerators > 1 else ''}"
    rows = []
    for ours in OURS:
        lane = ours.partition(", ")[2]
        for other in (FILES, S3):
            rows.append(
                Row(
                    what=f"{workload.name}: utilisation of {counted}, {lane}",
                    unit="%",
                    ours=100 * utilisations[ours],
                    bare=100 * utilisations[other],
                    against=other,
                    better="more",
                    goal=goal if other == FILES else None,
                )
            )
        for other in (FILES, S3):
            rows.append(
                Row(
                    what=f"{workload.name}: accelerators at {goal.bound:.0f} %, {lane}"
                    + (", where the search ends" if most[ours] == workload.most else ""),
                    unit="",
                    ours=most[ours],
                    bare=most[other],
                    against=other,
                    better="more",
                )
            )
    return rows
