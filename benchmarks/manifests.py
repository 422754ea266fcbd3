"""The list of a dataset's objects: what ten million cost to write, to open, to use, and each worker in memory."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import memory_folder
from torchcache.data.listing import changes
from torchcache.data.manifest import Manifest
from torchcache.model import ObjectId, ObjectInfo

OBJECTS: Final = 10_000_000
TINY_OBJECTS: Final = 70_000
WORKERS: Final = 8
BATCH: Final = 256
MOST_MB: Final = Goal(bound=16, of="value", sense="at most")


def measure(scale: Scale) -> Findings:
    """No server has a part in this: the listing is made up, with keys and ETags as S3 has them."""
    count, workers = (TINY_OBJECTS, 1) if scale.tiny else (OBJECTS, WORKERS)
    with memory_folder() as root:
        started = time.perf_counter()
        manifest = Manifest.write("s3", _objects(count), root)
        written_s = time.perf_counter() - started
        started = time.perf_counter()
        other = Manifest.write("s3", _objects(count, changed=count // 2), root)
        again_s = time.perf_counter() - started
        started = time.perf_counter()
        found = changes(manifest, other, "bucket/")
        compared_s = time.perf_counter() - started
        if len(found.changed) != 1 or found.added or found.removed:
            raise AssertionError(f"one object changed, not {found}")
        with multiprocessing.get_context("spawn").Pool(workers) as processes:
            used = processes.starmap(_use, [(manifest, seed) for seed in range(workers)])
    what = f"{count:,} objects"
    rows = [
        Row(what=f"{what}: the list made from a listing", unit="s", ours=min(written_s, again_s)),
        Row(what=f"{what}: refreshed, one of them changed", unit="s", ours=compared_s),
        Row(what=f"{what}: opened and verified by a worker", unit="s", ours=median(u[0] for u in used)),
        Row(what=f"{what}: {BATCH} of them, anywhere", unit="ms", ours=median(u[1] for u in used) * 1e3),
        Row(
            what=f"{what}: memory of its own in each of {workers} workers",
            unit="MB more",
            ours=max(u[2] for u in used) / 1e6,
            goal=MOST_MB,
        ),
    ]
    return Findings(title="Lists of objects", rows=rows)


def _objects(count: int, *, changed: int = -1) -> Iterator[ObjectInfo]:
    for number in range(count):
        key = f"bucket/train/{number // 1000:06d}/{number:09d}.jpg"
        yield ObjectInfo(ObjectId("s3", key, f"{number + (number == changed):032x}"), 100_000 + number % 7)


def _use(manifest: Manifest, seed: int) -> tuple[float, float, int]:
    """Seconds to open it, seconds for a batch, and bytes of memory that this process has more of for itself."""
    before = _anonymous_bytes()
    started = time.perf_counter()
    count = len(manifest)
    opened_s = time.perf_counter() - started
    chance = random.Random(seed)
    taken_s = []
    for _ in range(200):
        indices = chance.choices(range(count), k=BATCH)
        started = time.perf_counter()
        manifest.take(indices)
        taken_s.append(time.perf_counter() - started)
    return opened_s, median(taken_s), max(0, _anonymous_bytes() - before)


def _anonymous_bytes() -> int:
    """Memory that belongs to no file, and so to nobody else."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
