"""Proof by SIGKILL: live servers under load are killed at random instants, over and over, and started again.

Two servers, each with a store, a client and an under-store of its own, are killed side by side. After every restart:
I1 every read is right, I2 every acknowledged save loads bit-equal, from the pool until it is uploaded, I3 a save that
wasn't acknowledged is there whole or not at all, I4 calls end, I5 nothing is left behind and the room that is counted
is what lies on the disk. Faults F1, F2, F36.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.understore.posix_files import TEMPORARY_PREFIX

from examples.ports import free_port
from examples.seaweedfs import SeaweedFS
from tests.integration.self_describing import content
from tests.integration.store_load_child import PATIENCE_S, Job
from tests.integration.store_process_parts import (
    Child,
    ForkingStarter,
    Life,
    PlainStarter,
    Starter,
    on_disk,
)
from tests.proofs import proof

_SEED = os.environ.get("TORCHCACHE_KILL_SEED")  # read at import: tests run without any TORCHCACHE_ variable
_KILLS = int(os.environ.get("TORCHCACHE_KILLS", "500"))  # of the long run
MIB = 1 << 20
ANSWER_S = PATIENCE_S + 60
CAPACITY_BYTES = 96 * MIB
SETS = {
    "set-a": {f"{i}.bin": 9 * MIB + 123 for i in range(3)}
    | {f"s{i}.bin": 100_000 + 20_011 * i for i in range(16)},
    "set-b": {f"{i}.bin": 4 * MIB + i for i in range(7)} | {f"s{i}.bin": 1 + 64_321 * i for i in range(16)},
}
"""More than fits beside the checkpoints, so that segments are evicted too."""

BLOCKED = "run/ring-4/__0_0.distcp"
"""A folder lies there, in the way of an upload: what is saved to that path has to come from the pool to the end."""

FEW = 5
"""Kills of the test that always runs, with one seed: a run that passed passes again."""

CHECKPOINTS = [8192, 300_000, 4 * MIB, 5 * MIB, 9 * MIB + 4096]


class Target:
    """A server to be killed: its store, its client, and what was seen of both."""

    def __init__(self, folder: Path, starter: Starter, under_store: str, root: str, seed: int) -> None:
        folder.mkdir(exist_ok=True)
        self.store = folder / "store"
        self.kills = 0
        self.early = 0
        self.chance = random.Random(seed)
        self._starter = starter
        self._log = folder / "server.log"
        port = free_port(beside=1)
        token = folder / "token"
        self._arguments = [
            *("--listen", f"127.0.0.1:{port}", "--store", str(self.store), "--token-file", str(token)),
            *("--capacity", str(CAPACITY_BYTES), "--under-store", under_store, "--drain-s", "60"),
        ]
        self.life = self._start()
        self.life.wait_ready()
        job = Job(
            address=f"127.0.0.1:{port}",
            token=token.read_text().strip(),
            root=root,
            sets=SETS,
            checkpoints=CHECKPOINTS,
            seed=seed,
        )
        self.client = Child("tests.integration.store_load_child", asdict(job))
        self.client.answer(ANSWER_S, "job")
        self.descriptors: list[int] = []

    def cycle(self) -> None:
        """Load, kill, restart (killed again while it starts, sometimes), check."""
        self.ask("go")
        if self.chance.random() < 0.35:
            self.ask("acked")  # right behind it, its upload has hardly begun
        else:
            time.sleep(self.chance.uniform(0, 0.6))
        self.kill()
        while self.chance.random() < 0.35:
            self.life = self._start()
            time.sleep(self.chance.uniform(0, 0.12))
            self.early += 1
            self.kill()
        began_ns = time.time_ns()
        self.life = self._start()
        self.life.wait_ready()
        self.descriptors.append(int(self.ask("stop")["descriptors"]))
        self.ask("check")
        self._check_disk(began_ns)

    def kill(self) -> None:
        self.life.end(signal.SIGKILL)
        self.kills += 1

    def ask(self, order: str) -> dict[str, Any]:
        answer = self.client.ask(order, ANSWER_S)
        assert not answer["wrong"], self._story(answer["wrong"])
        return answer

    def finish(self) -> dict[str, int]:
        """The counts. First all is uploaded, and has to be right from there alone: through an empty store."""
        self.ask("settle")
        self.life.end(signal.SIGTERM, timeout_s=120)
        assert "not yet in the under-store" not in self._log.read_text()
        self.store.rename(self.store.with_name("left"))
        self.life = self._start()
        self.life.wait_ready()
        counts: dict[str, int] = self.ask("check")["counts"]
        assert self.descriptors[-1] <= self.descriptors[0] + 16, self.descriptors
        return counts

    def close(self) -> None:
        self.client.close()
        self.life.end()

    def _start(self) -> Life:
        return self._starter.start(self._arguments, self._log)

    def _check_disk(self, began_ns: int) -> None:
        """I5. The uploads that go on meanwhile drop segments of their own accord: so it is looked at again."""
        deadline = time.monotonic() + 90
        while True:
            status = self.ask("status")["status"]
            found = on_disk(self.store, older_than_ns=began_ns)
            if (found.fits(status["used_bytes"]) and not found.strange) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        assert not found.strange, self._story(found.strange)
        assert found.fits(status["used_bytes"]), self._story([f"{status} but {found}"])
        assert status["corrupt"] == 0, self._story([str(status)])

    def _story(self, wrong: list[str]) -> str:
        log = self._log.read_text()[-4000:]
        return "\n".join([f"after {self.kills} kills:", *wrong, "the server's log ends so:", log])


def make_source(folder: Path) -> str:
    for name, sizes in SETS.items():
        (folder / name).mkdir(parents=True)
        for file, size in sizes.items():
            (folder / name / file).write_bytes(content(file, 0, size))
    (folder / BLOCKED / "in the way").mkdir(parents=True)
    return f"file://{folder}"


def make_bucket(s3: SeaweedFS) -> str:
    bucket = s3.make_bucket()
    for name, sizes in SETS.items():
        for file, size in sizes.items():
            s3.client.put_object(Bucket=bucket, Key=f"{name}/{file}", Body=content(file, 0, size))
    return f"s3://{bucket}"


def kill_servers(tmp_path: Path, s3: SeaweedFS, starter: Starter, kills: int) -> dict[str, int | float | str]:
    """Kills two servers side by side, `kills` times in all; the figures of it."""
    seed = int(_SEED) if _SEED else random.SystemRandom().randrange(1 << 32) if kills > FEW else 1
    print(f"TORCHCACHE_KILL_SEED={seed}")
    source = tmp_path / "source"
    files, bucket = make_source(source), make_bucket(s3)
    targets: list[Target] = []
    failed = threading.Event()
    try:
        targets.append(Target(tmp_path / "a", starter, f"file={files}", files, seed))
        targets.append(Target(tmp_path / "b", starter, "s3=s3://", bucket, seed + 1))

        def work(target: Target) -> None:
            try:
                while sum(t.kills for t in targets) < kills and not failed.is_set():
                    target.cycle()
            except BaseException:
                failed.set()  # the other one need not go on
                raise

        def finish(target: Target) -> Counter[str]:
            return Counter(target.finish())

        with ThreadPoolExecutor(len(targets)) as threads:
            list(threads.map(work, targets))
            shutil.rmtree(source / BLOCKED)
            counts = sum(threads.map(finish, targets), Counter[str]())
        # What a killed writer left goes with the next write to its folder; to a path of step-* none need come.
        left = [p for p in source.rglob(f"{TEMPORARY_PREFIX}*") if not p.parent.name.startswith("step-")]
        assert not left
    finally:
        for target in targets:
            target.close()
    print(f"{dict(counts)}")
    assert counts["saves acknowledged"] and counts["reads"] and counts["loads"]
    return {
        "kills": sum(t.kills for t in targets),
        "of them during a start": sum(t.early for t in targets),
        "reads": counts["reads"],
        "GB read": round(counts["read bytes"] / 1e9, 1),
        "saves acknowledged": counts["saves acknowledged"],
        "loads of saves": counts["loads"],
        "of them not yet uploaded": counts["loads of what was not yet uploaded"],
        "of these with borrowed files": counts["loads of what was borrowed"],
        "seed": seed,
    }


def test_a_few_kills(tmp_path: Path, s3: SeaweedFS) -> None:
    """F1, F2, I1, I2, I3, I4, I5: each server is a `python -m torchcache_server`."""
    with PlainStarter() as starter:
        kill_servers(tmp_path, s3, starter, kills=FEW)


@pytest.mark.long
def test_five_hundred_kills(tmp_path: Path, s3: SeaweedFS) -> None:
    """F1, F2, I1, I2, I3, I4, I5: servers forked off a process that has done the imports, so that kills hit work."""
    with proof("kills") as figures, ForkingStarter() as starter:
        figures.update(kill_servers(tmp_path, s3, starter, kills=_KILLS))
        assert int(figures["kills"]) >= _KILLS
