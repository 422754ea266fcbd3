"""The power goes while `torchcache doctor` repairs: made again the repair ends well, and what it did stays (I2).

Same model as for the server's crash states. The doctor's removal of the index isn't behind the seam: images keep it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from torchcache_server.process import examination
from torchcache_server.process.examination import examine
from torchcache_server.store import Store

from tests.crash.exploring import EXTREMES, SCRATCH
from tests.crash.recorder import Recorder
from tests.crash.restarting import remove_tree, write_file
from tests.crash.volatile import Content, Disk, Image, Op
from tests.unit.damaged_store import (
    DATASET,
    NAMESPACE,
    REPAIRABLE,
    Damage,
    build,
    checkpoint_is_whole,
    loose_modes,
)
from tests.unit.store_parts import CAPACITY, chunk

DAMAGES = [
    damage for damage in REPAIRABLE if damage.inflict is not loose_modes
]  # modes aren't behind the seam


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "store"
    build(path)
    return path


@contextlib.contextmanager
def no_progress(_: str, __: int) -> Iterator[object]:
    yield lambda done: None


def image_of(root: Path) -> Image:
    folders, files = [], []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            folders.append(name)
        elif path.name != "store.lock":
            data = path.read_bytes()
            files.append((name, len(files) + 1, Content(data.rstrip(b"\0"), len(data))))
    return Image(tuple(folders), tuple(files))


def repaired(root: Path, disk: Disk) -> list[Op]:
    """The calls of a repair."""
    recorder = Recorder(str(root), disk, lambda path, node: None)
    with mock.patch.object(examination, "OS", recorder):
        report = examine(root / "store", repair=True, progress=no_progress)
    assert not report.unusable and not report.errors and not report.left
    return [item for item in recorder.trace if isinstance(item, Op)]


def write_image(image: Image, root: Path) -> None:
    root.mkdir(mode=0o700)
    for folder in sorted(image.folders):
        (root / folder).mkdir(mode=0o700)
    for path, _, content in image.files:
        if not (root / path).exists():
            write_file(str(root / path), content.data, content.size)
    write_file(str(root / "store/store.lock"), b"", 0)


def check(root: Path, damage: Damage, *, again: bool) -> None:
    if again:
        assert not examine(root / "store", repair=True, progress=no_progress).left
    report = examine(root / "store", repair=False, progress=no_progress)
    assert not report.unusable and not report.left, report
    store = Store(root / "store", capacity_bytes=CAPACITY)
    try:
        assert checkpoint_is_whole(store)
        assert next(usage for usage in store.namespaces() if usage.name == NAMESPACE).kept
        for number in set(range(15)) - set(damage.loses):
            found = store.lookup(chunk(number))
            assert found is not None and found.is_intact()
        if damage.kinds.isdisjoint({"flag", "lost-ledger"}):
            assert store.policy(DATASET).pinned
        aside = damage.kinds & {"record", "flag", "lost-ledger"}
        assert bool(os.listdir(root / "store/damaged") if (root / "store/damaged").exists() else ()) == bool(
            aside
        )
    finally:
        store.close()


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_power_cut_at_any_call_of_a_repair(damage: Damage, built: Path, tmp_path: Path) -> None:
    scratch = Path(SCRATCH or tmp_path, f"mending-{os.getpid()}")
    live = scratch / "live"
    live.mkdir(parents=True, mode=0o700)
    logging.disable(logging.CRITICAL)
    try:
        shutil.copytree(built, live / "store")
        damage.inflict(live / "store")
        disk = Disk.of(image_of(live))
        calls = repaired(live, disk)
        seen: set[tuple[bytes, bool]] = set()
        for done, call in enumerate([None, *calls]):
            finished = done == len(calls)
            if call is not None and not disk.apply(call) and not finished:
                continue
            for how in EXTREMES:
                image = disk.image(*how, random.Random(0))
                if (image.digest, finished) in seen:
                    continue
                seen.add((image.digest, finished))
                write_image(image, scratch / "image")
                try:
                    check(scratch / "image", damage, again=not finished)
                except AssertionError as error:
                    raise AssertionError(f"power cut behind call {done}, {call}; {how}") from error
                finally:
                    remove_tree(str(scratch / "image"))
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(scratch)
