"""Loaders as they are used roughly: many workers, forked late, out of order, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

import torchcache as tc
from tests.e2e.sharded import COUNT, dataset_of, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

NUMBERS = list(range(COUNT))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of files, and one of shards; the samples are the numbers up to COUNT."""
    files, tars = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("tars")
    for number in NUMBERS:
        (files / f"{number:03d}").write_bytes(b"%d" % number)
    write_shards(tars, "tar")
    return {"map": files, "tar": tars}


def number_of(data: memoryview) -> int:
    return int(bytes(data))


def make(kind: str, source: Path, pool: tc.Pool) -> Any:
    if kind == "map":
        return tc.CachedDataset.from_files(source, decode=number_of, pool=pool)
    return dataset_of(f"{source}/train-{{0..4}}.tar", pool, shuffle=True, seed=5)


def numbers(loader: Any) -> list[int]:
    return [n for batch in loader for n in batch.tolist()]


# ---- how many, and how they are started ----


@pytest.mark.parametrize("kind", ["map", "tar"])
@pytest.mark.forks
def test_eight_workers(sources: dict[str, Path], pool: tc.Pool, kind: str) -> None:
    """Really eight: each has read."""
    loader = DataLoader(make(kind, sources[kind], pool), batch_size=3, num_workers=8, persistent_workers=True)
    for _ in range(2):
        assert sorted(numbers(loader)) == NUMBERS


@pytest.mark.long
@pytest.mark.parametrize("kind", ["map", "tar"])
@pytest.mark.parametrize(
    ("method", "workers"),
    [*(("fork", workers) for workers in range(9)), ("spawn", 1), ("spawn", 8), ("forkserver", 8)],
)
@pytest.mark.forks
def test_any_number_of_workers(
    sources: dict[str, Path], pool: tc.Pool, kind: str, workers: int, method: str
) -> None:
    settings: dict[str, Any] = {"multiprocessing_context": method} if workers else {}
    for persistent in {workers > 0, method != "fork"}:  # those that take long to start, once
        loader = DataLoader(
            make(kind, sources[kind], pool),
            batch_size=3,
            num_workers=workers,
            persistent_workers=persistent,
            **settings,
        )
        for _ in range(2):
            assert sorted(numbers(loader)) == NUMBERS


@pytest.mark.parametrize("kind", ["map", "tar"])
@pytest.mark.forks
def test_a_worker_that_forks_late(sources: dict[str, Path], pool: tc.Pool, kind: str) -> None:
    """From a process whose threads read all the time, which has an epoch half read, and errors and samples in hand."""
    stop, wrong = threading.Event(), []

    def read_on() -> None:
        mine = make("map", sources["map"], pool)
        while not stop.is_set():
            if mine.__getitems__(NUMBERS) != NUMBERS:
                wrong.append("other samples")

    readers = [threading.Thread(target=read_on) for _ in range(3)]
    held: list[Any] = []
    for reader in readers:
        reader.start()
    try:
        dataset = make(kind, sources[kind], pool)
        early = iter(DataLoader(dataset, batch_size=3, num_workers=2))
        front = [*next(early).tolist(), *next(early).tolist()]
        for _ in range(3):
            held.append(pool.read_each(make("map", sources["map"], pool)._samples.extents(NUMBERS)))
            try:
                pool.stat("file:///nowhere/to/be/found")
            except tc.ObjectNotFound as error:
                held.append(error)
            late = DataLoader(make(kind, sources[kind], pool), batch_size=3, num_workers=2)
            assert sorted(numbers(late)) == NUMBERS
        assert sorted(front + numbers(early)) == NUMBERS
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong


class HeldUp:
    """A transform that waits in worker 0 for a file: until it is there, all batches are other workers'."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, sample: int) -> int:
        info = get_worker_info()
        while info is not None and info.id == 0 and not self._file.exists():
            time.sleep(0.01)
        return sample


@pytest.mark.forks
def test_batches_out_of_order(sources: dict[str, Path], pool: tc.Pool, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    dataset = tc.CachedDataset.from_files(
        sources["map"], decode=number_of, transform=HeldUp(go_on), pool=pool
    )
    batches = iter(DataLoader(dataset, batch_size=4, num_workers=2, in_order=False))
    first = next(batches).tolist()
    assert first == NUMBERS[4:8], "worker 1's, ahead of worker 0's"
    go_on.touch()
    assert sorted(first + numbers(batches)) == NUMBERS


@pytest.mark.long
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has memory to be pinned for")
@pytest.mark.parametrize("collate", [None, tc.collate])
@pytest.mark.forks
def test_pinned_batches(tmp_path: Path, pool: tc.Pool, collate: Any) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}").write_bytes(bytes([number]) * 100_000)
    dataset = tc.CachedDataset.from_files(tmp_path, output="tensor", pool=pool)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True, collate_fn=collate)
    for _ in range(2):
        batches = list(loader)
        assert all(batch.is_pinned() for batch in batches)
        on_gpu = torch.cat([batch.to("cuda", non_blocking=True) for batch in batches])
        assert on_gpu[:, ::9_999].cpu().tolist() == [[number] * 11 for number in range(12)]


# ---- Ctrl-C ----

_INTERRUPTED = """
import os, signal, sys, time
import torch
import torchcache as tc
from torch.utils.data import DataLoader, RandomSampler
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
kind, source, workers, where = sys.argv[1:]

def transform(sample):
    if where == "in a transform":
        os.write(1, b"waits\\n")
        time.sleep(3600)
    return 0

if kind == "map":
    dataset = tc.CachedDataset.from_files(source, transform=transform)
    sampler = RandomSampler(dataset, generator=torch.Generator())
    dataset.prefetch(sampler, 0)
else:
    dataset, sampler = tc.CachedIterableDataset(source + "/*.tar", shuffle=True, transform=transform), None
loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=int(workers), persistent_workers=workers != "0")
while True:
    for number, batch in enumerate(loader):
        if number == 9 and where == "in the loop":
            os.killpg(0, signal.SIGINT)
        os.write(1, b"waits\\n")
"""


def interrupt(kind: str, source: Path, workers: int, where: str) -> tuple[int, str]:
    """The exit status of a program that gets Ctrl-C, and what it says; SIGINT goes to all of its processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, kind, str(source), str(workers), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for _ in range(max(1, workers)):  # all of them are there
            assert process.stdout is not None
            process.stdout.readline()
        if where != "in the loop":
            os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=150)
    finally:
        process.kill()
        process.wait()
    return process.returncode, told


@pytest.mark.parametrize(("kind", "workers"), [("tar", 0), ("tar", 2), ("map", 4)])
def test_ctrl_c_ends_a_program_without_a_flood(sources: dict[str, Path], kind: str, workers: int) -> None:
    status, told = interrupt(kind, sources[kind], workers, "in the loop")
    assert status == -signal.SIGINT, told
    assert "KeyboardInterrupt" in told
    # One of the program. Another may come of multiprocessing, caught when it was about to hand over a batch.
    assert told.count("Traceback") <= 2, told


@pytest.mark.long
@pytest.mark.parametrize("kind", ["map", "tar"])
@pytest.mark.parametrize("workers", [0, 1, 8])
@pytest.mark.parametrize("where", ["anywhere", "in a transform"])
def test_ctrl_c_at_any_time(sources: dict[str, Path], kind: str, workers: int, where: str) -> None:
    status, told = interrupt(kind, sources[kind], workers, where)
    assert status == -signal.SIGINT, told
    assert "KeyboardInterrupt" in told
    assert told.count("Traceback") <= 3, told
