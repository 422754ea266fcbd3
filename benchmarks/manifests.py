"""The list of a dataset's objects: what ten million take of memory and CPU to list, to refresh, to open and to use.

All of it beside a tenth as many: memory that is flat is the same for both. CPU seconds are counted and no wall time, as
nothing here waits for anybody.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple, TypeVar

import numpy as np

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import memory_folder
from torchcache.data.key_order import by_key
from torchcache.data.listing import changes
from torchcache.data.manifest import Manifest
from torchcache.data.mapped_ints import MappedInts
from torchcache.model import ObjectId, ObjectInfo

OBJECTS: Final = 10_000_000
TINY_OBJECTS: Final = 70_000
WORKERS: Final = 8
BATCH: Final = 256
RECORDS: Final = 7
"""Of an object that has records."""

MOST_MB: Final = Goal(bound=16, of="value", sense="at most")
MOST_MB_LISTING: Final = Goal(bound=512, of="value", sense="at most")
LOOK_S: Final = 0.01
"""How often a process's memory is looked at."""

_FOLDER: Final = 1000
T = TypeVar("T")


class Cost(NamedTuple):
    """CPU seconds, and the most memory that belongs to no file, in bytes more than before."""

    cpu_s: float
    most_bytes: int


class Used(NamedTuple):
    """A worker's: CPU seconds to open the list, those of a batch, and bytes that it has more of for itself."""

    opened_s: float
    batch_s: float
    more_bytes: int


class Found(NamedTuple):
    """What one number of objects costs."""

    listed: Cost
    sorted: Cost
    refreshed: Cost
    used: list[Used]


def measure(scale: Scale) -> Findings:
    """No server has a part in this: the listing is made up, with keys and ETags as S3 has them."""
    count, workers = (TINY_OBJECTS, 1) if scale.tiny else (OBJECTS, WORKERS)
    fewer = count // 10
    with memory_folder() as root:
        few, many = (_found(number, workers, root / str(number)) for number in (fewer, count))

    def memory(what: str, value: Callable[[Found], int], goal: Goal) -> Row:
        return Row(
            what=f"{count:,} objects: memory, {what}",
            unit="MB more",
            ours=value(many) / 1e6,
            bare=value(few) / 1e6,
            against=f"{fewer:,}",
            goal=goal,
        )

    def cpu(what: str, unit: str, value: float) -> Row:
        return Row(what=f"{count:,} objects: CPU, {what}", unit=unit, ours=value)

    rows = [
        memory(
            f"of its own in each of {workers} workers",
            lambda found: max(used.more_bytes for used in found.used),
            MOST_MB,
        ),
        memory("to list by key", lambda found: found.listed.most_bytes, MOST_MB_LISTING),
        memory(
            "to sort what was listed side by side", lambda found: found.sorted.most_bytes, MOST_MB_LISTING
        ),
        memory("to refresh, one of them changed", lambda found: found.refreshed.most_bytes, MOST_MB_LISTING),
        cpu("to list by key", "s", many.listed.cpu_s),
        cpu("to sort what was listed side by side", "s", many.sorted.cpu_s),
        cpu("to refresh, one of them changed", "s", many.refreshed.cpu_s),
        cpu("to open and verify, in a worker", "s", median(used.opened_s for used in many.used)),
        cpu(f"to take {BATCH} of them, anywhere", "ms", median(used.batch_s for used in many.used) * 1e3),
    ]
    return Findings(title="Lists of objects", rows=rows)


def _found(count: int, workers: int, root: Path) -> Found:
    manifest, listed = _apart(_list, count, root)
    unsorted, _ = _apart(_list_side_by_side, count, root)
    other, in_order = _apart(_sort, unsorted, root)
    unsorted.path.unlink()
    _, refreshed = _apart(_refresh, manifest, other)
    firsts = MappedInts.write(np.arange(count + 1) * RECORDS, root)
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        used = processes.starmap(_use, [(manifest, firsts, seed) for seed in range(workers)])
    return Found(listed, in_order, refreshed, used)


def _apart(work: Callable[..., T], *arguments: object) -> tuple[T, Cost]:
    """What `work` returns and costs in a process of its own: what others have freed would hide what it takes."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_watched, (work, *arguments))


def _list(count: int, root: Path) -> Manifest:
    return Manifest.write("s3", _objects(count), root)


def _list_side_by_side(count: int, root: Path) -> Manifest:
    return Manifest.write("s3", _objects(count, changed=count // 2, side_by_side=True), root)


def _sort(manifest: Manifest, root: Path) -> Manifest:
    return Manifest.of_batches("s3", by_key(manifest, root), root)


def _refresh(old: Manifest, new: Manifest) -> None:
    found = changes(old, new, "bucket/")
    if len(found.changed) != 1 or found.added or found.removed:
        raise RuntimeError(f"one object changed, not {found}")


def _objects(count: int, *, changed: int = -1, side_by_side: bool = False) -> Iterator[ObjectInfo]:
    """By key; or folder by folder, which come in any order."""
    folders = range(-(-count // _FOLDER))
    for folder in random.Random(1).sample(folders, len(folders)) if side_by_side else folders:
        for number in range(folder * _FOLDER, min(count, (folder + 1) * _FOLDER)):
            key = f"bucket/train/{folder:06d}/{number:09d}.jpg"
            yield ObjectInfo(
                ObjectId("s3", key, f"{number + (number == changed):032x}"), 100_000 + number % 7
            )


def _watched(work: Callable[..., T], *arguments: object) -> tuple[T, Cost]:
    """What `work` returns, and what it cost this process."""
    ended = threading.Event()
    before = most = _anonymous_bytes()

    def look() -> None:
        nonlocal most
        while not ended.wait(LOOK_S):
            most = max(most, _anonymous_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        started = time.process_time()
        returned = work(*arguments)
        cost_s = time.process_time() - started
    finally:
        ended.set()
        looking.join()
    return returned, Cost(cost_s, max(most, _anonymous_bytes()) - before)


def _use(manifest: Manifest, firsts: MappedInts, seed: int) -> Used:
    """Opens the list, and the numbers of the objects' first records; then takes batches of either, anywhere."""
    before = _anonymous_bytes()
    started = time.process_time()
    count = len(manifest)
    starts = firsts.array()
    opened_s = time.process_time() - started
    chance = random.Random(seed)
    taken_s = []
    for _ in range(200):
        indices = chance.choices(range(count), k=BATCH)
        started = time.process_time()
        manifest.take(indices)
        taken_s.append(time.process_time() - started)
        found = np.searchsorted(starts, [RECORDS * index + 3 for index in indices], side="right") - 1
        if found.tolist() != indices:
            raise RuntimeError("a record was found in another object than its own")
    return Used(opened_s, median(taken_s), max(0, _anonymous_bytes() - before))


def _anonymous_bytes() -> int:
    """Memory of this process that belongs to no file, and so to nobody else."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
