"""A reader of one pool that trusts nobody: all it gets is held against what it knows, at once, and once more later.

Driven through stdin, a line an order; the first is a Job. Every answer has `wrong`, what should not have happened.

    "go"      read until told otherwise, in some threads, holding views for a while
    "stop"    end the calls under way, look at all views once more, let go of them
    "check"   with the server up: everything must be read right now, errors are none
    "left"    descriptors and mappings of segments that this process has, with nothing held
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from tests.collected import until_collected
from tests.integration.self_describing import difference
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError, TorchCacheError, TransientError
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool

HELD = 150
PATIENCE_S = 60.0
REFUSED = 5
"""Exit code of a forked child whose pool said that it can't be used there."""


@dataclass(frozen=True)
class Job:
    """`objects` are (key, version, size) by namespace. Those in `harmed` are read whole and into buffers:
    somebody damages them on disk, and so under any view."""

    address: str
    token: str
    lane: str
    objects: dict[str, list[tuple[str, str, int]]]
    harmed: str
    seed: int
    threads: int = 2


@dataclass(frozen=True)
class Held:
    """A view, of bytes from `start` on."""

    key: str
    start: int
    view: memoryview

    def wrong(self) -> str:
        return difference(self.key, 0, self.start, self.view)


class Reader:
    """Reads and holds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.pool: Pool = connect(job.address, token=job.token, lane=job.lane)
        self._objects = {
            namespace: [
                (key, ObjectInfo(ObjectId("file", key, version), size)) for key, version, size in found
            ]
            for namespace, found in job.objects.items()
        }
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._going = threading.Event()
        self._threads: list[threading.Thread] = []
        self._least_descriptors: int | None = None

    def answer(self, **more: object) -> dict[str, object]:
        with self._lock:
            local = self.pool.statistics().local_extents
            counts = {**self._counts, "read from the store's files": local}
            return {"counts": counts, "wrong": list(self._wrong), **more}

    def go(self) -> None:
        self._going.set()
        self._threads = [
            threading.Thread(target=self._guarded, args=(number,)) for number in range(self._job.threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._going.clear()
        for thread in self._threads:
            thread.join()

    def left(self) -> dict[str, object]:
        """What there is once it is as little as the first time: threads and sockets end when they find the time."""

        def found() -> tuple[int, int]:
            maps = Path("/proc/self/maps").read_text().count(".segment")
            return sum(1 for _ in Path("/proc/self/fd").iterdir()), maps

        least = self._least_descriptors
        until_collected(lambda: found()[1] == 0 and (least is None or found()[0] <= least + 2))
        descriptors, mappings = found()
        self._least_descriptors = descriptors if least is None else least
        return {"descriptors": descriptors, "mappings": mappings}

    def check(self) -> None:
        """All of every dataset, twice, so that the second time most of it is there."""
        for namespace, objects in self._objects.items():
            for _ in range(2):
                for at in range(0, len(objects), 8):
                    some = objects[at : at + 8]
                    views = self.pool.read([Extent(info) for _, info in some], namespace=namespace)
                    for (key, _), view in zip(some, views, strict=True):
                        self._judge(Held(key, 0, view), "read")

    def meet(self) -> None:
        """Until calls get through to the server, which is up."""
        deadline = time.monotonic() + PATIENCE_S
        nothing = [Extent(ObjectInfo(ObjectId("samples", "nothing", "0"), -1))]
        while time.monotonic() < deadline:
            try:
                self.pool.status()
                if not isinstance(self.pool.read_each(nothing, resident_only=True)[0], TransientError):
                    return
            except TransientError:
                pass
            time.sleep(0.05)

    def _guarded(self, number: int) -> None:
        try:
            self._read(random.Random(f"{self._job.seed} {number}"))
        except BaseException:
            with self._lock:
                self._wrong.append(traceback.format_exc())

    def _read(self, chance: random.Random) -> None:
        held: deque[Held] = deque()
        while self._going.is_set():
            if chance.random() < 0.02:
                self._fork(list(held))
            namespace = chance.choice(list(self._objects))
            wanted = [self._wish(chance, namespace) for _ in range(chance.randrange(1, 24))]
            extents = [extent for _, extent in wanted]
            harmed = namespace == self._job.harmed
            buffers = self._buffers(extents) if harmed or chance.random() < 0.3 else None
            outcomes = self._outcomes(extents, namespace, buffers, resident_only=chance.random() < 0.3)
            for (key, extent), outcome in zip(wanted, outcomes, strict=True):
                if isinstance(outcome, TorchCacheError):
                    self._count(type(outcome).__name__)
                    continue
                got = Held(key, extent.offset, outcome)
                self._judge(got, "read")
                if not harmed and chance.random() < 0.5:
                    held.append(got)
            while len(held) > chance.randrange(HELD):
                self._judge(held.popleft(), "held")
        while held:
            self._judge(held.popleft(), "held")

    def _wish(self, chance: random.Random, namespace: str) -> tuple[str, Extent]:
        key, info = chance.choice(self._objects[namespace])
        if chance.random() < 0.4 or namespace == self._job.harmed:
            return key, Extent(info)
        start = chance.randrange(info.size)
        return key, Extent(info, start, chance.randrange(min(info.size - start, 200_000) + 1))

    @staticmethod
    def _buffers(extents: list[Extent]) -> list[memoryview]:
        return [memoryview(bytearray(extent.end - extent.offset)) for extent in extents]

    def _outcomes(
        self, extents: list[Extent], namespace: str, into: list[memoryview] | None, *, resident_only: bool
    ) -> list[memoryview | TorchCacheError]:
        try:
            return self.pool.read_each(
                extents, namespace=namespace, into=into, resident_only=resident_only, timeout_s=20.0
            )
        except TransientError as error:  # no server could be met at all
            return [error for _ in extents]

    def _fork(self, held: list[Held]) -> None:
        """A child that looks at the views it inherits, and reads for itself."""
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                namespace = next(name for name in self._objects if name != self._job.harmed)
                (key, info), *_ = self._objects[namespace]
                (outcome,) = self._outcomes([Extent(info)], namespace, None, resident_only=False)
                fine = isinstance(outcome, TransientError) or (
                    isinstance(outcome, memoryview) and not Held(key, 0, outcome).wrong()
                )
                code = 3 if any(one.wrong() for one in held) else 0 if fine else 4
            except ConfigurationError:  # gRPC could not be put to rest in time: it is said, and nothing hangs
                code = 3 if any(one.wrong() for one in held) else REFUSED
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._count("forks")
        if code == REFUSED:
            self._count("forks refused")
        elif code:
            with self._lock:
                self._wrong.append(f"a forked child ended with {code}")

    def _judge(self, one: Held, what: str) -> None:
        self._count(what)
        if wrong := one.wrong():
            with self._lock:
                self._wrong.append(f"I1: {what}: {wrong}")

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def main() -> None:
    reader = Reader(Job(**json.loads(sys.stdin.readline())))
    print(json.dumps(reader.answer()), flush=True)
    for line in sys.stdin:
        more: dict[str, object] = {}
        match json.loads(line):
            case "go":
                reader.go()
            case "stop":
                reader.stop()
            case "check":
                try:
                    reader.meet()
                    reader.check()
                except Exception:
                    reader._wrong.append(traceback.format_exc())
            case "left":
                reader.pool.close()
                more = reader.left()
        print(json.dumps(reader.answer(**more)), flush=True)


if __name__ == "__main__":
    main()
