"""Load on a pool whose server is killed over and over: reads two datasets, publishes new versions of their objects,
saves checkpoints and loads them, and holds all it gets against what it knows. Driven through stdin, a line an order:

    (a Job)   first of all
    "go"      work until told otherwise
    "stop"    finish the calls under way: answered when they have ended
    "check"   with the server up: all objects and checkpoints must be right now, errors are none
    "settle"  with the server up: write once more to every place that is written to again and again
    "acked"   wait for the next save to be acknowledged, a few seconds at most
    "status"  what the server says of its store

Every answer has `wrong`: what should not have happened so far.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tests.integration.described_saves import load, save
from tests.integration.self_describing import content, difference, generation_of
from torchcache.connecting import connect
from torchcache.errors import (
    IntegrityError,
    NotCommitted,
    NotResident,
    ObjectChanged,
    TorchCacheError,
    TransientError,
)
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool, SaveInfo

FROZEN_BYTES = 1 << 20
"""In every save; the smaller ones of these can borrow it."""
READ_S = 20.0
ACKED_S = 3.0
PATIENCE_S = 90.0
"""How long after "stop" the calls under way may take."""


@dataclass(frozen=True)
class Job:
    """What to work on. `sets` has the files' names and sizes of each dataset, a folder under `root`."""

    address: str
    token: str
    root: str
    sets: dict[str, dict[str, int]]
    checkpoints: list[int]  # bytes of the state saved at each path, over and over
    seed: int
    publishes: float = 0.03  # of the steps of readers
    pause_s: float = 0.0  # between the steps of each thread


class Tally:
    """What was done, by name; and what should not have happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def wrong(self, what: str) -> None:
        with self._lock:
            self._wrong.append(what)

    def answer(self, **more: object) -> dict[str, object]:
        with self._lock:
            return {"counts": dict(self._counts), "wrong": list(self._wrong), **more}


@dataclass
class File:
    """One object of a dataset. A version, once seen with a generation, must keep it."""

    uri: str
    name: str
    info: ObjectInfo
    newest: int = 0  # generation of the last one that was, or may have been, published
    candidates: dict[str, set[int]] = field(default_factory=dict)  # version -> generations it may be
    stale: list[ObjectInfo] = field(default_factory=list)
    lost_track: bool = False  # a publish failed: what is there now isn't known

    def meet(self, info: ObjectInfo, generations: set[int]) -> None:
        """`info` is what is there now."""
        if info.id.version != self.info.id.version:
            self.stale = [*self.stale[-2:], self.info]
        self.info = info
        self.candidates.setdefault(info.id.version, generations)
        self.lost_track = False

    def judge(self, info: ObjectInfo, start: int, data: memoryview) -> str:
        """What is wrong with bytes that were read of a version."""
        candidates = self.candidates[info.id.version]
        told = generation_of(data, start)
        if told is None:
            found = [g for g in candidates if not difference(self.name, g, start, data)]
            return "" if found else f"{info.id}: {len(data)} bytes of none of {sorted(candidates)}"
        if told not in candidates:
            return f"{info.id} from {start} on is of generation {told}, not of {sorted(candidates)}"
        candidates.intersection_update({told})
        return difference(self.name, told, start, data)


class DatasetReader:
    """Reads the objects of one dataset, and now and then publishes one anew."""

    def __init__(
        self, pool: Pool, tally: Tally, uri: str, sizes: dict[str, int], seed: int, publishes: float
    ) -> None:
        self._pool = pool
        self._tally = tally
        self._uri = uri
        self._publishes = publishes
        self._chance = random.Random(seed)
        self._files: list[File] = []
        for name, size in sizes.items():
            info = pool.stat(f"{uri}/{name}")
            assert info.size == size
            self._files.append(File(f"{uri}/{name}", name, info, candidates={info.id.version: {0}}))

    def step(self) -> None:
        """One call, or a few. Raises nothing that is allowed to happen."""
        if self._chance.random() < self._publishes:
            small = [f for f in self._files if f.info.size < 1 << 20]
            self._publish(self._chance.choice(small if self._chance.random() < 0.9 else self._files))
        wanted = [self._wish() for _ in range(self._chance.randrange(1, 24))]
        for file, info, extent, outcome in self._read(wanted):
            if isinstance(outcome, TransientError):
                self._tally.add(f"read refused: {type(outcome).__name__}")
            elif isinstance(outcome, ObjectChanged) and (info is not file.info or file.lost_track):
                self._tally.add("read of a replaced version refused")
            elif isinstance(outcome, TorchCacheError):
                self._tally.wrong(f"read of {extent}: {outcome!r}")
            else:
                self._judge(file, info, extent, outcome)

    def check(self) -> None:
        """The server is up: all that it holds is right, and so is what it has to fetch."""
        for file in self._files:
            if file.lost_track:
                self._look(file)
        some = self._chance.sample(self._files, 8)
        for resident_only, files in ((True, self._files), (False, some)):
            wanted = [(file, file.info, Extent(file.info)) for file in files]
            for file, info, extent, outcome in self._read(wanted, resident_only=resident_only):
                if isinstance(outcome, NotResident) and resident_only:
                    continue
                if isinstance(outcome, TorchCacheError):
                    self._tally.wrong(f"read of {extent} while the server is up: {outcome!r}")
                else:
                    self._judge(file, info, extent, outcome)

    def settle(self) -> None:
        """Publishes once more."""
        self._publish(min(self._files, key=lambda file: file.info.size))

    def _wish(self) -> tuple[File, ObjectInfo, Extent]:
        file = self._chance.choice(self._files)
        is_old = file.stale and self._chance.random() < 0.1
        info = self._chance.choice(file.stale) if is_old else file.info
        if self._chance.random() < 0.2:
            return file, info, Extent(info)
        start = self._chance.randrange(info.size)
        return (
            file,
            info,
            Extent(info, start, self._chance.randrange(min(info.size - start, 300_000) + 1)),
        )

    def _read(
        self, wanted: list[tuple[File, ObjectInfo, Extent]], *, resident_only: bool = False
    ) -> list[tuple[File, ObjectInfo, Extent, memoryview | TorchCacheError]]:
        extents = [extent for _, _, extent in wanted]
        try:
            outcomes = self._pool.read_each(
                extents, namespace=self._uri, resident_only=resident_only, timeout_s=READ_S
            )
        except TransientError as error:  # no server could be met at all
            outcomes = [error for _ in extents]
        return [(*wish, outcome) for wish, outcome in zip(wanted, outcomes, strict=True)]

    def _judge(self, file: File, info: ObjectInfo, extent: Extent, data: memoryview) -> None:
        self._tally.add("reads")
        self._tally.add("read bytes", len(data))
        if len(data) != extent.end - extent.offset:
            self._tally.wrong(f"{extent} gave {len(data)} bytes")
        elif wrong := file.judge(info, extent.offset, data):
            self._tally.wrong(f"I1: {wrong}")

    def _publish(self, file: File) -> None:
        file.newest += 1
        data = content(file.name, file.newest, file.info.size)
        file.lost_track = True
        try:
            info = self._pool.publish(file.uri, [data])
        except TorchCacheError as error:
            self._refused("publish", error)
            try:
                self._look(file)
            except TransientError:
                pass
            return
        self._tally.add("published")
        file.meet(info, {file.newest})

    def _look(self, file: File) -> None:
        oldest = min(file.candidates[file.info.id.version])
        file.meet(self._pool.stat(file.uri), set(range(oldest, file.newest + 1)))

    def _refused(self, what: str, error: TorchCacheError) -> None:
        if isinstance(error, IntegrityError):
            self._tally.wrong(f"{what}: {error!r}")
        self._tally.add(f"{what} refused: {type(error).__name__}")


@dataclass
class Path:
    """A path that is saved to over and over, and what is known of it."""

    uri: str
    size: int
    least: int = -1  # the last save that was acknowledged or seen; -1: none
    tried: int = -1  # the last save that was begun


class Checkpoints:
    """Saves and loads. One thread saves; others load."""

    def __init__(self, pool: Pool, tally: Tally, root: str, sizes: list[int], seed: int) -> None:
        self._pool = pool
        self._tally = tally
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._root = root
        self._paths = [Path(f"{root}/ring-{i}", size) for i, size in enumerate(sizes)]
        self._fresh: list[Path] = []
        self.acknowledged = threading.Event()

    def step_save(self) -> None:
        """One save, to a path of the ring or, sometimes, to a new one."""
        self._save(self._choose())

    def settle(self) -> None:
        """Saves once more to every path of the ring."""
        for path in self._paths:
            self._save(path)

    def _choose(self) -> Path:
        if self._chance.random() < 0.25:
            path = Path(f"{self._root}/step-{len(self._fresh)}", 8192)
            with self._lock:
                self._fresh.append(path)
            return path
        return self._chance.choice(self._paths)

    def _save(self, path: Path) -> None:
        with self._lock:
            path.tried += 1
        number = path.tried
        try:
            overwrite = path in self._paths
            save(self._pool, path.uri, number, path.size, frozen=FROZEN_BYTES, overwrite=overwrite)
        except TorchCacheError as error:
            if isinstance(error, IntegrityError):
                raise
            self._tally.add(f"save refused: {type(error).__name__}")
            return
        self._tally.add("saves acknowledged")
        self._tally.add("saved bytes", path.size)
        with self._lock:
            path.least = max(path.least, number)
        self.acknowledged.set()

    def step_load(self) -> None:
        """One load, of a path that may be saved to meanwhile: an old one or the new one, whole (I3)."""
        with self._lock:
            path = random.choice([*self._paths, *self._fresh[-3:]])
            least = path.least
        try:
            self._load(path, least)
        except NotCommitted:
            if least >= 0:
                raise
        except TorchCacheError as error:
            if isinstance(error, IntegrityError):
                raise
            self._tally.add(f"load refused: {type(error).__name__}")

    def check(self) -> None:
        """With the server up and nobody saving: what was acknowledged is there, what wasn't is whole or not at all."""
        for path in [*self._paths, *self._fresh[-6:]]:
            try:
                before = self._info(path)
                self._load(path, path.least)
                if {before.state, self._info(path).state} <= {"committed", "failed"}:
                    self._tally.add("loads of what was not yet uploaded")
                    self._tally.add("loads of what was borrowed", bool(before.borrowed))
            except NotCommitted as error:
                if path.least >= 0:
                    self._tally.wrong(f"I2: save {path.least} of {path.uri} is gone: {error!r}")

    def _info(self, path: Path) -> SaveInfo:
        store, key = self._pool.resolve(path.uri)
        return self._pool.get_save(store, key, manifest=False)

    def _load(self, path: Path, least: int) -> None:
        number, wrong = load(self._pool, path.uri, path.size, frozen=FROZEN_BYTES)
        self._tally.add("loads")
        if wrong:
            self._tally.wrong(f"I3: {wrong} of {path.uri} are not of save {number}, as its number is")
        if not least <= number <= path.tried:
            self._tally.wrong(
                f"I2: {path.uri} holds save {number}; {least} was acknowledged, {path.tried} tried"
            )
        with self._lock:
            path.least = max(path.least, number)


class Workers:
    """Threads that repeat their step between "go" and "stop"."""

    def __init__(self, tally: Tally, steps: dict[str, Callable[[], None]], pause_s: float) -> None:
        self._tally = tally
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._going = False
        self._busy: dict[str, float] = {}  # name -> when its step began
        for name, step in steps.items():
            threading.Thread(target=self._work, args=(name, step), name=name, daemon=True).start()

    def go(self) -> None:
        with self._changed:
            self._going = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Returns when all have finished their step. One that doesn't is wrong: I4."""
        with self._changed:
            self._going = False
            if not self._changed.wait_for(lambda: not self._busy, PATIENCE_S):
                frames = sys._current_frames()
                for thread in threading.enumerate():
                    if thread.name in self._busy and thread.ident in frames:
                        stack = "".join(traceback.format_stack(frames[thread.ident]))
                        self._tally.wrong(f"I4: {thread.name} does not end:\n{stack}")

    def _work(self, name: str, step: Callable[[], None]) -> None:
        while True:
            with self._changed:
                self._busy.pop(name, None)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._going)
                self._busy[name] = time.monotonic()
            try:
                step()
            except BaseException:
                self._tally.wrong(f"{name}:\n{traceback.format_exc()}")
                with self._changed:
                    self._going = False
            time.sleep(self._pause_s)


def meet_server(pool: Pool) -> None:
    """Returns once a control call and a read have got through to the server, which is up.

    The outage may have used up the retries that the pool allows itself, and gRPC waits a while before it connects
    again.
    """
    nothing = [Extent(ObjectInfo(ObjectId("samples", "nothing", "0"), -1))]
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            pool.status()
            (outcome,) = pool.read_each(nothing, resident_only=True)
            if isinstance(outcome, NotResident) or time.monotonic() > deadline:
                return
        except TransientError:
            if time.monotonic() > deadline:
                return
        time.sleep(0.05)


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job(**json.loads(sys.stdin.readline()))
    tally = Tally()
    pool = connect(job.address, token=job.token)
    readers = [
        DatasetReader(pool, tally, f"{job.root}/{name}", sizes, job.seed + i, job.publishes)
        for i, (name, sizes) in enumerate(job.sets.items())
    ]
    checkpoints = Checkpoints(pool, tally, f"{job.root}/run", job.checkpoints, job.seed)
    steps = {f"reader {i}": reader.step for i, reader in enumerate(readers)}
    workers = Workers(
        tally, {**steps, "saver": checkpoints.step_save, "loader": checkpoints.step_load}, job.pause_s
    )
    print(json.dumps(tally.answer()), flush=True)
    for line in sys.stdin:
        more: dict[str, object] = {}
        match json.loads(line):
            case "go":
                workers.go()
            case "stop":
                workers.stop()
                more = {"descriptors": len(list(pathlib.Path("/proc/self/fd").iterdir()))}
            case "check" | "settle" as order:
                try:
                    meet_server(pool)
                    for part in (*readers, checkpoints):
                        getattr(part, order)()
                except Exception:
                    tally.wrong(f"{order}:\n{traceback.format_exc()}")
            case "acked":
                checkpoints.acknowledged.clear()
                checkpoints.acknowledged.wait(ACKED_S)
            case "status":
                more = {"status": asdict(pool.status()[0])}
        print(json.dumps(tally.answer(**more)), flush=True)


if __name__ == "__main__":
    main()
