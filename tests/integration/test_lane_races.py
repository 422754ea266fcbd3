"""Readers of the store's own files against all that its server does: nothing they hold ever changes, nothing is wrong.

Readers in other processes, with threads and forks of their own; the server evicts, recycles, compacts, quarantines, is
stopped and killed.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import pytest

from examples.ports import free_port
from tests.integration.lane_reader_child import Job
from tests.integration.pool_server import PoolServer
from tests.integration.self_describing import content
from tests.integration.store_process_parts import Child
from tests.proofs import proof
from torchcache.errors import TransientError
from torchcache.model import Extent, ObjectInfo

ANSWER_S = 150.0
CAPACITY = "40MiB"
SIZES = {"a": [900_000] * 20, "b": [40_000, 2_300_001, 5_000_011] * 4, "harmed": [300_000] * 12}
STEPS = 12
SEED = os.environ.get("LANE_RACES_SEED")


WHAT = ("read from the store's files", "held")
"""What a run must have seen of, however slow the machine is."""


class Chaos:
    """A server, and everything that can happen to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        port = free_port(beside=1)
        self.server = PoolServer(
            folder, capacity=CAPACITY, more=("--listen", f"127.0.0.1:{port}", "--scrub-rate", "20MB")
        )
        self.server.start()
        self.objects: dict[str, list[tuple[str, ObjectInfo]]] = {}
        for name, sizes in SIZES.items():
            path = self.server.source / name
            path.mkdir()
            found = self.objects.setdefault(f"file://{path}", [])
            for number, size in enumerate(sizes):
                key = f"{name}/{number}"
                (path / str(number)).write_bytes(content(key, 0, size))
                found.append((key, self.server.pool.stat(f"file://{path}/{number}")))
        self.harmed = f"file://{self.server.source}/harmed"
        self.counts: Counter[str] = Counter()
        self.recycled = 0

    def job(self, lane: str, seed: int) -> Job:
        objects = {
            namespace: [(key, info.id.version, info.size) for key, info in found]
            for namespace, found in self.objects.items()
        }
        return Job(self.server.address, self.server.token, lane, objects, self.harmed, seed)

    def step(self) -> None:
        """One thing that happens."""
        weights: dict[Callable[[], None], int] = {
            self.evict: 6,
            self.fill: 8,
            self.damage: 4,
            self.squeeze: 2,
            self.wait: 4,
            self.kill: 1,
            self.restart: 1,
        }
        [action] = self._chance.choices(list(weights), list(weights.values()))
        self.counts[action.__name__] += 1
        try:
            action()
        except TransientError:
            self.counts["refused"] += 1

    def evict(self) -> None:
        self.server.pool.evict(self._chance.choice(list(self.objects)))

    def fill(self) -> None:
        """Reads all of one: what there is no room for pushes others out, and their files are used again."""
        namespace = self._chance.choice(list(self.objects))
        for _, info in self.objects[namespace]:
            self.server.pool.read([Extent(info, 0, 1)], namespace=namespace)

    def squeeze(self) -> None:
        """Half the room for one, and all of it again: chunks are dropped among others that stay, and moved."""
        namespace = self._chance.choice(list(self.objects))
        self.server.pool.set_policy(namespace, quota_bytes=4_000_000)
        self.wait()
        self.server.pool.set_policy(namespace, quota_bytes=0)

    def damage(self) -> None:
        """A wrong byte in a segment of the dataset whose views nobody keeps; locked, or it might become another's."""
        for path in sorted((self.server.store / "segments").rglob("*.segment")):
            try:
                with path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    head = file.read(4096)
                    if self.harmed.encode() not in head:
                        continue
                    size = os.fstat(file.fileno()).st_size
                    file.seek(self._chance.randrange(4096, max(4097, min(size, 3_000_000))))
                    file.write(self._chance.randbytes(1))
            except (FileNotFoundError, BlockingIOError):
                continue

    def wait(self) -> None:
        time.sleep(self._chance.uniform(0, 0.5))

    def kill(self) -> None:
        self._again(signal.SIGKILL)

    def restart(self) -> None:
        self._again(signal.SIGTERM)

    def _again(self, number: signal.Signals) -> None:
        self.note()
        self.server.restart(number)

    def note(self) -> None:
        """What the server counts, before it ends."""
        status = self.server.status
        self.recycled += status.recycled_segments
        self.counts["evicted chunks"] += status.evicted_chunks
        self.counts["damaged chunks found"] += status.corrupt

    def close(self) -> None:
        self.server.pool.close()
        self.server.life.end()


def counted(answers: list[dict[str, object]]) -> Counter[str]:
    """What all readers have done."""
    counts: Counter[str] = Counter()
    for answer in answers:
        found = answer["counts"]
        assert isinstance(found, dict)
        counts.update(found)
    return counts


@pytest.mark.parametrize(("seconds", "readers"), [(6, 2), pytest.param(240, 4, marks=pytest.mark.long)])
def test_readers_of_the_files_against_all_that_a_server_does(
    tmp_path: Path, seconds: int, readers: int
) -> None:
    """I1, I4, I5, F1, F5, F28, F29, F38: bytes are right when they come, and the same a while later."""
    seed = int(SEED) if SEED else random.SystemRandom().randrange(1 << 32) if seconds > 60 else 1
    print(f"LANE_RACES_SEED={seed}")
    with proof("lane-races") as figures, ExitStack() as stack:
        chaos = stack.enter_context(closing(Chaos(tmp_path, seed)))
        lanes = ["local"] * readers + ["flight"]
        children = [
            stack.enter_context(
                closing(Child("tests.integration.lane_reader_child", asdict(chaos.job(lane, seed + n))))
            )
            for n, lane in enumerate(lanes)
        ]
        for child in children:
            child.answer(ANSWER_S, "job")

        def ask(order: str) -> list[dict[str, object]]:
            answers = [child.ask(order, ANSWER_S) for child in children]
            wrong = [what for answer in answers for what in answer["wrong"]]  # type: ignore[attr-defined]
            assert not wrong, "\n".join(
                [f"{len(wrong)} wrong", *wrong[:5], chaos.server.log.read_text()[-2000:]]
            )
            return answers

        ask("check")
        before = ask("left")
        ask("go")
        end = time.monotonic() + seconds
        enough = False
        while time.monotonic() < end or chaos.counts.total() < STEPS or not enough:
            assert time.monotonic() < end + ANSWER_S, "nothing is read from the files, or held"
            chaos.step()
            enough = time.monotonic() >= end and all(counted(ask("count"))[what] for what in WHAT)
        ask("stop")
        ask("check")
        chaos.note()
        after = ask("left")
        counts = counted(after)
        print(dict(counts), dict(chaos.counts), chaos.recycled)
        for first, last in zip(before, after, strict=True):
            assert last["mappings"] == 0
            assert int(str(last["descriptors"])) <= int(str(first["descriptors"])) + 2
        assert all(counts[what] for what in WHAT)
        assert 20 * counts["forks refused"] <= max(counts["forks"], 20)
        assert chaos.recycled or seconds < 60, "a short run may be too short for it on a busy machine"
        figures.update(
            seconds=seconds,
            reads=counts["read"],
            views_seen_again=counts["held"],
            forks=counts["forks"],
            forks_refused=counts["forks refused"],
            recycled_segments=chaos.recycled,
            kills=chaos.counts["kill"],
            seed=str(seed),
        )
