"""A client on a host of its own, told what to do line by line. The pool is that of `TORCHCACHE_POOL`.

    {"seed": N}                                    first of all
    {"do": "know", "folder": URI}                  objects that say they are "FOLDER/NAME"; known as FOLDER
    {"do": "read", "folder": NAME, "timeout_s": T, "resident_only": BOOL}     all of them, once
    {"do": "go", "folder": NAME, "batch": N, "timeout_s": T}       reads at random, until "stop"
    {"do": "count"}                                how many calls it has made since "go" or "mark"
    {"do": "mark"}                                 forgets the times so far
    {"do": "stop"}
    {"do": "pool"}                                 who is in the pool, announced, passed over; what they evicted
    {"do": "save" | "load", "uri": URI, "number": N, "size": BYTES}
    {"do": "durable", "uri": URI}                  waits until all saves below are that have been committed
    {"do": "forget", "uri": URI}                   deletes all saves below

"read", "mark" and "stop" are answered by `times_s` of the calls, `errors` by class, `wrong` bytes, and `late`: calls
that went on after their deadline.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing
from typing import Any, Final

from tests.integration.self_describing import difference
from torchcache.connecting import connect
from torchcache.errors import InUse, NotResident, TorchCacheError, TransientError
from torchcache.model import Extent, ObjectInfo
from torchcache.registry import Registry, RegistryAddress

GRACE_S: Final = 30.0
"""How long after its deadline a call may end on a machine that is busy."""
WAIT_S: Final = 240.0

Objects = list[tuple[str, ObjectInfo]]


class Findings:
    """What calls brought. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.take()

    def take(self) -> dict[str, Any]:
        """What there is, which is forgotten."""
        with self._lock:
            found = getattr(self, "_found", None)
            self._found: dict[str, Any] = {"times_s": [], "errors": {}, "wrong": [], "late": []}
        return found or {}

    @property
    def calls(self) -> int:
        return len(self._found["times_s"])

    def add(self, took_s: float, timeout_s: float, errors: Counter[str], wrong: list[str]) -> None:
        with self._lock:
            found = self._found
            found["times_s"].append(took_s)
            found["errors"] = dict(Counter(found["errors"]) + errors)
            found["wrong"] += wrong
            if took_s > timeout_s + GRACE_S:
                found["late"].append(took_s)


class Client:
    """What the orders do."""

    def __init__(self, seed: int) -> None:
        self._pool = connect()
        self._chance = random.Random(seed)
        self._folders: dict[str, Objects] = {}
        self._findings = Findings()
        self._going = threading.Event()
        self._thread = threading.Thread()

    def know(self, folder: str) -> dict[str, Any]:
        name = folder.rpartition("/")[2]
        listed = list(self._pool.list(folder))
        self._folders[name] = [(f"{name}/{info.id.key.rpartition('/')[2]}", info) for info in listed]
        return {"count": len(listed)}

    def read(self, folder: str, timeout_s: float, resident_only: bool = False) -> dict[str, Any]:
        findings = Findings()
        self._call(self._folders[folder], timeout_s, findings, resident_only=resident_only)
        return findings.take()

    def go(self, folder: str, batch: int, timeout_s: float) -> dict[str, Any]:
        objects = self._folders[folder]

        def work() -> None:
            while self._going.is_set():
                self._call(self._chance.sample(objects, batch), timeout_s, self._findings)

        self._findings.take()
        self._going.set()
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return {}

    def count(self) -> dict[str, Any]:
        return {"calls": self._findings.calls}

    def mark(self) -> dict[str, Any]:
        return self._findings.take()

    def stop(self) -> dict[str, Any]:
        self._going.clear()
        self._thread.join()
        return self._findings.take()

    def pool(self) -> dict[str, Any]:
        seen = self._pool.statistics()
        servers = self._pool.status()
        members = [one.address for one in servers]
        address = self._pool.address
        announced = members
        if address.startswith("etcd://"):
            with closing(Registry(RegistryAddress.parse(address))) as registry:
                announced = [one.address for one in registry.servers()]
        return {
            "members": members,
            "announced": announced,
            "out": list(seen.out),
            "evicted": {one.address: one.evicted_chunks for one in servers},
            "damaged": {one.address: one.corrupt for one in servers},
        }

    def save(self, uri: str, number: int, size: int) -> dict[str, Any]:
        from tests.integration.described_saves import save

        save(self._pool, uri, number, size)
        return {}

    def load(self, uri: str, number: int, size: int) -> dict[str, Any]:
        from tests.integration.described_saves import load

        found, wrong = load(self._pool, uri, size)
        return {"wrong": wrong if found == number else [*wrong, f"save {found}, not {number}"]}

    def durable(self, uri: str) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                states = {save.path: save.state for save in self._pool.list_saves(uri)}
            except TransientError:
                states = {}
            waiting = set(states.values()) & {"committed", "failed"}
            if (states and not waiting) or time.monotonic() > deadline:
                return {"states": states}
            time.sleep(0.1)

    def forget(self, uri: str) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                saves = self._pool.list_saves(uri)
                if not saves:
                    return {}
                for save in saves:
                    self._pool.delete_save(save.store, save.path)
            except (InUse, TransientError):  # whoever read it last is gone, and may not have said so
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _call(
        self, objects: Objects, timeout_s: float, findings: Findings, *, resident_only: bool = False
    ) -> None:
        extents = [Extent(info) for _, info in objects]
        began = time.monotonic()
        try:
            outcomes: list[memoryview | TorchCacheError] = self._pool.read_each(
                extents, namespace="", timeout_s=timeout_s, resident_only=resident_only
            )
        except TorchCacheError as error:  # nobody could be met at all
            outcomes = [error for _ in extents]
        took_s = time.monotonic() - began
        errors: Counter[str] = Counter()
        wrong = []
        for (key, info), outcome in zip(objects, outcomes, strict=True):
            if isinstance(outcome, NotResident) and resident_only:
                continue
            if isinstance(outcome, TorchCacheError):
                errors[type(outcome).__name__] += 1
            elif len(outcome) != info.size or (found := difference(key, 0, 0, outcome)):
                wrong.append(f"{key}: {len(outcome)} bytes of {info.size}; {found}")
        findings.add(took_s, timeout_s, errors, wrong)


def main() -> None:
    warnings.simplefilter("ignore")
    client = Client(json.loads(sys.stdin.readline())["seed"])
    print("{}", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(client, order.pop("do"))(**order)
        except TorchCacheError as error:
            answer = {"error": type(error).__name__, "transient": isinstance(error, TransientError)}
        except Exception:
            answer = {"error": traceback.format_exc(), "transient": False}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
