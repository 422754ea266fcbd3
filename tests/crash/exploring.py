"""Goes through the states in which a crash may leave the disk, and counts those whose promises are kept."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import xxhash

from tests.crash.promises import Observation, Promises, broken
from tests.crash.recorder import Item
from tests.crash.restarting import Restart, materialise, remove_tree
from tests.crash.volatile import Disk, Image, Op, Survival
from tests.crash.workloads import SAVE_WORKLOADS, STORE_WORKLOADS, Workload, go_on, go_on_saving
from tests.crash.world import Trace, World, small_world

SCRATCH: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None

EXTREMES: Final[list[tuple[Survival, Survival]]] = [
    (names, data) for names in ("lost", "kept") for data in ("lost", "kept")
]
_DRAWN: Final[list[tuple[Survival, Survival]]] = [
    (names, data) for names in ("lost", "kept", "subset") for data in ("subset", "torn")
] + [("subset", "lost"), ("subset", "kept")]
DRAWN_WAYS: Final = len(_DRAWN)


@dataclass
class Findings:
    """What was checked.

    `draws` counts (prefix of the calls, what survives, seed); of those with the same prefix some gave the same image:
    `states` counts them once. `images` are the digests of different images: over each of them a server was started.
    """

    draws: int = 0
    states: int = 0
    images: set[bytes] = field(default_factory=set)
    traces: int = 0
    calls: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.draws += other.draws
        self.states += other.states
        self.images |= other.images
        self.traces += other.traces
        self.calls += other.calls
        self.violations += other.violations


@dataclass(frozen=True)
class Effort:
    """`draws`: how often each prefix is drawn at random, in each of some `ways`, of those that there are.

    `kills`, `cuts`: so many restarts are recorded themselves.
    """

    draws: int
    kills: int
    cuts: int
    ways: int = DRAWN_WAYS


def explore(name: str, seed: int, effort: Effort) -> Findings:
    """All states of a workload, and of the restarts after it was killed, or lost its power, somewhere."""
    findings = Findings()
    with small_world(seed), tempfile.TemporaryDirectory(dir=SCRATCH, prefix="crash-") as scratch:
        rng = random.Random(f"{name} {seed}")
        trace = record(name, seed, scratch)
        findings.add(crash_everywhere(trace, effort, seed, scratch))
        for number in range(effort.kills + effort.cuts):
            later = restart_somewhere(trace, rng, scratch, killed=number < effort.kills)
            findings.add(crash_everywhere(later, effort, seed, scratch))
    return findings


def workload_of(name: str) -> tuple[Workload, bool]:
    """The workload, and whether it saves."""
    return (SAVE_WORKLOADS[name], True) if name in SAVE_WORKLOADS else (STORE_WORKLOADS[name], False)


def record(name: str, seed: int, scratch: str) -> Trace:
    """The trace of a workload over an empty disk."""
    workload, saves = workload_of(name)
    trace = Trace(f"{name} {seed}", Disk(), Promises(), saves=saves)
    root = os.path.join(scratch, "live")
    os.mkdir(root)
    _run(World(root, trace), workload, random.Random(f"{name} {seed} steps"), root)
    return trace


def _run(world: World, workload: Workload, rng: random.Random, root: str) -> None:
    try:
        workload(world, rng)
    finally:
        world.kill()
        remove_tree(root)


def restart_somewhere(trace: Trace, rng: random.Random, scratch: str, *, killed: bool) -> Trace:
    """The trace of a restart in the midst of another trace.

    After a kill the disk forgets nothing, and what was volatile still is. After a power cut what is left is durable.
    """
    at = rng.choice(_telling(trace) if rng.random() < 0.5 else range(1, len(trace.items) + 1))
    disk, promises = trace.disk.copy(), trace.promises.copy()
    for item in trace.items[:at]:
        _apply(item, disk, promises)
    how: tuple[Survival, Survival] = ("kept", "kept") if killed else rng.choice(EXTREMES + _DRAWN)
    image = disk.image(*how, rng)
    later = Trace(
        f"{trace.name}, {'killed' if killed else f'cut {how}'} at {at}, restarted",
        disk if killed else Disk.of(image),
        promises,
        payloads=dict(trace.payloads),
        indexes=dict(trace.indexes),
        saves=trace.saves,
    )
    root = os.path.join(scratch, "live")
    materialise(image, root, trace, rng)
    _run(World(root, later), go_on_saving if trace.saves else go_on, rng, root)
    return later


def _telling(trace: Trace) -> list[int]:
    """Instants at which a name has just been changed: what it means is visible and not yet durable."""
    calls = ("rename", "unlink", "create", "make_dir")
    return [at + 1 for at, item in enumerate(trace.items) if isinstance(item, Op) and item.call in calls]


def _apply(item: Item, disk: Disk, promises: Promises) -> bool:
    """Whether the disk or what is expected of it has changed."""
    if isinstance(item, Op):
        return disk.apply(item)
    item.apply(promises)
    return True


def crash_everywhere(trace: Trace, effort: Effort, seed: int, scratch: str) -> Findings:
    """A power cut after every call, and what survives of it in all ways that are asked for."""
    findings = Findings(traces=1, calls=sum(isinstance(item, Op) for item in trace.items))
    restart = Restart(trace, os.path.join(scratch, "restart"))
    seen: dict[tuple[bytes, bytes], Observation] = {}
    disk, promises = trace.disk.copy(), trace.promises.copy()
    for at, item in enumerate(trace.items):
        if not _apply(item, disk, promises):
            continue
        in_bucket = _digest_of(promises.bucket) if trace.saves else b""
        here: set[bytes] = set()
        for how, rng, image in _images(disk, effort, f"{seed} {trace.name} {at}"):
            digest = image.digest
            findings.draws += 1
            if digest in here:
                continue
            here.add(digest)
            key = (digest, in_bucket)
            if key not in seen:
                seen[key] = restart.over(image, promises.bucket, rng)
            findings.violations += [
                f"{what}\n    {trace.name}: power cut behind call {at}, {item}; names {how[0]}, data {how[1]}"
                for what in broken(promises, restart.chunks, seen[key])
            ]
        findings.states += len(here)
        findings.images |= here
    return findings


def _images(
    disk: Disk, effort: Effort, seed: str
) -> Iterator[tuple[tuple[Survival, Survival], random.Random, Image]]:
    """Images of the disk, with what survives in them, and the generator that drew them."""
    drawn = [_DRAWN] * effort.draws
    if effort.ways < DRAWN_WAYS:  # others at each prefix
        chance = random.Random(f"{seed} ways")
        drawn = [chance.sample(ways, effort.ways) for ways in drawn]
    for draw, ways in enumerate([EXTREMES, *drawn]):
        for how in ways:
            rng = random.Random(f"{seed} {how} {draw}")
            yield how, rng, disk.image(*how, rng)
            if disk.is_durable:
                return


def _digest_of(bucket: dict[str, bytes]) -> bytes:
    seen = xxhash.xxh3_128()
    for key, data in sorted(bucket.items()):
        seen.update(f"{key} {len(data)} ".encode() + data)
    return bytes(seen.digest())
