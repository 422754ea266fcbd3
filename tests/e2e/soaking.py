"""A pool on hosts of its own under load, while one fault after the other comes and goes.

Each shift has clients, datasets and checkpoints of its own. At its end, and after every fault, all that was
acknowledged must be there and all that is read right; what is wrong at any time ends the soak.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from examples.seaweedfs import environment
from tests.e2e.hosts import DATA_PORT, PORT, S3_PORT, Cluster, ServerHost
from tests.integration.own_mounts import fill_up
from tests.integration.store_load_child import PATIENCE_S, Job
from tests.integration.store_process_parts import Child
from tests.proxy import Fault
from torchcache.records import SUFFIX, folder_name

CAPACITY: Final = "36MB"
"""Less than the datasets of two shifts take, so that there is always something to evict."""

ANSWER_S: Final = 4 * PATIENCE_S
FAULT_S: Final = (1.0, 6.0)
SETS: Final = {
    name: {f"{n}.bin": 3_000_000 + n for n in range(4)} | {f"s{n}.bin": 20_000 + 7_001 * n for n in range(24)}
    for name in ("set-a", "set-b")
}
CHECKPOINTS: Final = [8192, 300_000, 1_000_000, 2_500_000]


class Shift:
    """Clients that work on one root each."""

    def __init__(self, cluster: Cluster, number: int, seed: int) -> None:
        self._cluster = cluster
        self.roots: list[str] = []
        self.counts: Counter[str] = Counter()
        self._children: list[Child] = []
        token = (cluster.folder / "keys" / "token").read_text().strip()
        for client, host in enumerate(cluster.clients):
            folder = f"shift-{number}-{client}"
            for name, sizes in SETS.items():
                cluster.put(f"{folder}/{name}", sizes, called="")
            root = f"s3://{cluster.bucket}/{folder}"
            self.roots.append(root)
            job = Job(
                address=cluster.pool,
                token=token,
                root=root,
                sets=SETS,
                checkpoints=CHECKPOINTS,
                seed=seed + client,
                publishes=0.0,
                pause_s=0.02,
            )
            with environment(cluster.variables(client)):
                child = Child("tests.integration.store_load_child", asdict(job), through=host.through)
            self._children.append(child)
        for child in self._children:
            child.answer(ANSWER_S, "job")

    def tell(self, order: str) -> None:
        """All clients, one after the other; nothing may have been wrong."""
        self.counts = Counter()
        for child in self._children:
            answer: dict[str, Any] = child.ask(order, ANSWER_S)
            assert not answer["wrong"], "\n".join(answer["wrong"])
            self.counts += Counter(answer["counts"])

    def close(self) -> None:
        for child in self._children:
            child.close()


class Soak:
    """The faults, by name, and what happened. The last two servers live on from the beginning to the end."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self._chance = random.Random(seed)
        self._shift: Shift | None = None
        self._shifts = 0
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.steady_counts: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "kills": lambda: self._away(signal.SIGKILL),
            "restarts": lambda: self._away(signal.SIGTERM),
            "stops": lambda: self._any().stopped(),
            "pulled cables": lambda: self._any().unplugged(),
            "resets": lambda: self._gray("reset"),
            "slow spells": lambda: self._gray("delay"),
            "full disks": self._full,
            "damaged files": self._damaged,
            "leaders of etcd killed": self._without_leader,
            "storage stalls": lambda: self._storage("stall"),
            "storage resets": lambda: self._storage("reset"),
        }

    @property
    def steady(self) -> list[ServerHost]:
        """Those that are never killed nor started again."""
        return self._cluster.servers[2:]

    def begin_shift(self) -> None:
        self._shift = Shift(self._cluster, self._shifts, self._seed + 100 * self._shifts)
        self._shifts += 1

    def meet(self, kind: str) -> None:
        """One fault under load; then all is well again, and has to be right."""
        assert self._shift is not None
        print(f"{kind} after {sum(self.faults.values())} faults, seed {self._seed}")
        self._shift.tell("go")
        with self.kinds[kind]():
            time.sleep(self._chance.uniform(*FAULT_S))
        self._shift.tell("stop")
        self._shift.tell("check")
        self.faults[kind] += 1

    def end_shift(self, *, from_storage: bool = False) -> None:
        """All is uploaded, and right; with `from_storage` though the servers have lost all that they had.

        Then its checkpoints go, as those of a run do in the end: what servers take is compared between shifts.
        """
        assert self._shift is not None
        with self._cluster.client(0) as client:
            for root in self._shift.roots:
                states = client.tell("durable", uri=f"{root}/run")["states"]
                assert not set(states.values()) & {"committed", "failed"}, states
            seen = client.tell("pool")
        for what in ("evicted", "damaged"):
            told = [seen[what].get(f"{server.host.address}:{PORT}", 0) for server in self.steady]
            self.steady_counts[what] = max(self.steady_counts[what], sum(told))
        self._shift.tell("check")
        if from_storage:
            self._lose_everything()
            self._shift.tell("check")
        self.counts += self._shift.counts
        self._shift.close()
        with self._cluster.client(0) as client:
            for root in self._shift.roots:
                client.tell("forget", uri=f"{root}/run")
        self._shift = None

    def close(self) -> None:
        if self._shift is not None:
            self._shift.close()

    # ---- the faults ----

    def _any(self) -> ServerHost:
        return self._chance.choice(self._cluster.servers)

    @contextmanager
    def _away(self, how: signal.Signals) -> Iterator[None]:
        server = self._chance.choice(self._cluster.servers[:2])
        code = server.end(how)
        assert how is signal.SIGKILL or code == 0, "something was left that was not uploaded"
        yield
        server.start()

    @contextmanager
    def _gray(self, kind: Any) -> Iterator[None]:
        after = 0 if kind == "delay" else self._chance.randrange(1_000_000)
        self._cluster.gray.harm(DATA_PORT, Fault(kind=kind, after=after, delay_s=0.3))
        yield
        self._cluster.gray.heal(DATA_PORT)

    @contextmanager
    def _storage(self, kind: Any) -> Iterator[None]:
        after = 0 if kind == "stall" else self._chance.randrange(1_000_000)
        self._cluster.storage.harm(S3_PORT, Fault(kind=kind, after=after))
        yield
        self._cluster.storage.heal(S3_PORT, cut=True)

    @contextmanager
    def _full(self) -> Iterator[None]:
        theirs = self._any().disk / "theirs"
        fill_up(theirs)
        yield
        theirs.unlink()

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        """Bits flip in what a server holds of the datasets, under its eyes."""
        assert self._shift is not None
        folders = [folder_name(f"{root}/{name}") for root in self._shift.roots for name in SETS]
        segments = self._any().disk / "store" / "segments"
        files = [file for folder in folders for file in sorted((segments / folder).glob(f"*{SUFFIX}"))]
        for file in self._chance.sample(files, min(3, len(files))):
            _flip(file, self._chance)
        yield

    @contextmanager
    def _without_leader(self) -> Iterator[None]:
        leader = self._cluster.etcd.leader()
        self._cluster.etcd.kill(leader)
        yield
        self._cluster.etcd.start(leader)
        self._cluster.etcd.leader()

    def _lose_everything(self) -> None:
        for server in self._cluster.servers:
            assert server.end(signal.SIGTERM) == 0
            shutil.rmtree(server.disk / "store")
            server.start()


def _flip(file: Path, chance: random.Random) -> None:
    """One bit, somewhere behind the header. The file may go meanwhile."""
    try:
        fd = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        at = chance.randrange(4096, max(4097, os.fstat(fd).st_size))
        byte = os.pread(fd, 1, at)
        if byte:
            os.pwrite(fd, bytes([byte[0] ^ 1 << chance.randrange(8)]), at)
    finally:
        os.close(fd)
