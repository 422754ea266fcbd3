"""Damage at random to a whole store: the doctor finds it or it does no harm, and nothing that must be kept is lost."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from torchcache_server.cache.slots import Slots
from torchcache_server.process.examination import examine
from torchcache_server.store import DiskCalls, Store

from tests.proofs import proof
from tests.unit.damaged_store import (
    KEY,
    NAMESPACE,
    SIZE,
    build,
    checkpoint_is_whole,
    save,
    segment_of,
)
from tests.unit.store_parts import CAPACITY, flip_bit, held, overwrite
from tests.unit.test_examination import silent
from torchcache.errors import ConfigurationError

KINDS = ["flip", "zeros", "cut", "gone"]


def inflict(path: Path, rng: random.Random) -> tuple[str, Path]:
    """One damage to one file; the small ones are hit as often as the segments.

    Records don't vanish: one that isn't there is one that was never written, to everybody.
    """
    file = rng.choice(sorted(f for f in path.rglob("*") if f.is_file() and f.name != "store.lock"))
    kind, size = rng.choice(KINDS[:3] if file.suffix == ".record" else KINDS), file.stat().st_size
    if kind == "gone" or not size:
        file.unlink()
        return "gone", file
    at = rng.randrange(min(size, 6 << 20))  # behind that, segments are holes
    match kind:
        case "flip":
            flip_bit(file, at, rng.randrange(8))
        case "zeros":
            start = at - at % 4096
            overwrite(file, start, bytes(min(4096, size - start)))
        case "cut":
            with file.open("r+b") as opened:
                opened.truncate(at)
    return kind, file


class Unsynced(DiskCalls):
    """No power is cut here."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: str) -> None:
        pass


def stamps(path: Path) -> list[tuple[Path, int, int]]:
    """When anything was last changed."""
    return sorted((found, found.stat().st_ctime_ns, found.stat().st_mtime_ns) for found in path.rglob("*"))


def trial(template: Path, path: Path, rng: random.Random, count: int) -> bool:
    """Damages a store `count` times; whether the doctor found damage. Asserts what must hold whatever it was."""
    shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["cp", "-a", template, path], check=True)  # and holes stay holes
    segment = segment_of(path, NAMESPACE)
    hit = [inflict(path, rng) for _ in range(count)]
    before = stamps(path)
    found = examine(path, repair=False, progress=silent)
    assert stamps(path) == before, hit
    repaired = examine(path, repair=True, progress=silent)
    assert not found.unusable, hit
    assert [f.kind for f in repaired.findings] == [f.kind for f in found.findings], hit
    left = {finding.kind for finding in repaired.left}
    again = examine(path, repair=True, progress=silent)
    assert {finding.kind for finding in again.left} == left, hit
    assert not again.repaired, hit
    try:
        store = Store(path, capacity_bytes=CAPACITY, disk=Unsynced())
    except ConfigurationError:
        assert left, f"a start is refused, and nobody said why: {hit}"
        return True
    slots = Slots(store)
    for number in range(15):
        held(store, number, SIZE)  # or fails
    slot = slots.find(KEY)
    known = None if slot is None else slot.save  # its record may be set aside
    if segment not in (file for _, file in hit):
        assert checkpoint_is_whole(store), hit
    elif not checkpoint_is_whole(store):
        assert left & {"save", "header", "payload"} or known is None, hit
    if known is not None:
        assert known == save(), hit
    store.close()
    return bool(found.left)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache_server.process.examination.OS", Unsynced())


def trials(tmp_path: Path, seed: int, number: int) -> None:
    template = tmp_path / "template"
    build(template)
    rng = random.Random(seed)
    with proof("doctor-random-damage") as figures:
        found = sum(trial(template, tmp_path / "store", rng, 1 + n % 3) for n in range(number))
        figures |= {"stores": number, "damaged_found": found, "seed": seed}
    assert found > number // 2


def test_random_damage(tmp_path: Path) -> None:
    """F5, F6, F7, F8, I1, I2, I6."""
    trials(tmp_path, seed=3, number=45)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_much_random_damage(tmp_path: Path) -> None:
    """F5, F6, F7, F8, I1, I2, I6."""
    trials(tmp_path, seed=4, number=5000)
