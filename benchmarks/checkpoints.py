"""Checkpoints through torch's own save and load: ours beside FileSystemWriter and -Reader, and beside raw calls."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import memory_folder
from benchmarks.rounds import Result, alternate
from benchmarks.savers import Ours, Stock
from benchmarks.states import RawFile, State, check, cleared, large_state, small_state, two_threads

OURS: Final = "torchcache"
STOCK: Final = "FileSystemWriter, not synced"
STOCK_READER: Final = "FileSystemReader"
RAW_NEW: Final = "pwrite, 2 threads, a new file"
RAW_SAME: Final = "pwrite, 2 threads, into the same file"
RAW_READ: Final = "preadv, 2 threads, into the same memory"
RAW_SYNCED: Final = "pwrite, 2 threads, a new file, fsync"
MEMCPY: Final = "copy into the same memory"
FEW_ROUNDS: Final = 5
"""Of what takes seconds a round: many small tensors, a disk."""

Results = Mapping[str, Result]


@dataclass(frozen=True)
class Size:
    """How much is saved."""

    tensors: int
    tensor_bytes: int
    small_tensors: int


SIZE: Final = Size(tensors=104, tensor_bytes=8 << 20, small_tensors=10_000)
TINY: Final = Size(tensors=3, tensor_bytes=1 << 16, small_tensors=20)


def measure(scale: Scale) -> Findings:
    """Saves that replace one another, first saves, loads, the stop of an async save; many small tensors; a disk."""
    size = TINY if scale.tiny else SIZE
    state = large_state(size.tensors, size.tensor_bytes)
    small = small_state(size.small_tensors)
    what = f"{sum(t.nbytes for t in state.values()) / 1e9:.2f} GB"
    few = f"{size.small_tensors:,} tensors of at most 4 KiB"
    saves, loads, stops = _in_memory(state, scale.rounds)
    first = _first_saves(state, scale.rounds)
    small_saves, small_loads = saves_and_loads(small, min(scale.rounds, FEW_ROUNDS))
    synced = _on_disk(state, min(scale.rounds, FEW_ROUNDS))
    rows = [
        _row(f"save of {what}, from the second on", saves, STOCK, 3.0),
        _row(f"save of {what}, from the second on", saves, RAW_SAME),
        _row(f"first save of {what}", first, RAW_NEW, 0.8),
        _row(f"load of {what}", loads, STOCK_READER, 5.0),
        _row(f"load of {what}", loads, RAW_READ, 0.8),
        _row(f"stop of training in async_save of {what}", stops, MEMCPY, 1 / 1.1),
        _row(f"save of {few}", small_saves, STOCK, 3.0),
        _row(f"load of {few}", small_loads, STOCK_READER, 3.0),
        _row(f"save of {what} on a disk, synced", synced, RAW_SYNCED, 0.95),
    ]
    groups = {
        "save, from the second on": saves,
        "first save": first,
        "load": loads,
        "stop of training in async_save": stops,
        "save on a disk, synced": synced,
    }
    contenders = {name: list(results.values()) for name, results in groups.items()}
    return Findings(title="Checkpoints", rows=rows, contenders=contenders)


def _in_memory(state: State, rounds: int) -> tuple[Results, Results, Results]:
    into = cleared(state)
    with memory_folder() as root, two_threads() as threads, Ours(root / "ours", state, into) as ours:
        stock = Stock(root / "stock", state, into)
        new = RawFile(root / "new", state, into, threads)
        same = RawFile(root / "same", state, into, threads)
        saves = alternate(
            {OURS: ours.save, STOCK: stock.save, RAW_NEW: new.write, RAW_SAME: same.write},
            after={OURS: ours.settle, RAW_NEW: new.remove},
            rounds=rounds,
            warm_up=2,
        )
        loads = alternate({OURS: ours.load, STOCK_READER: stock.load, RAW_READ: same.read}, rounds=rounds)
        ours.load()
        check(into, state)

        def copy() -> int:
            return sum(into[name].copy_(tensor).nbytes for name, tensor in state.items())

        stops = alternate(
            {OURS: ours.begin_async, MEMCPY: copy}, after={OURS: ours.end_async}, rounds=rounds, warm_up=2
        )
    return saves, loads, stops


def _first_saves(state: State, rounds: int) -> Results:
    """Each into a pool that is new."""
    with memory_folder() as root, two_threads() as threads, ExitStack() as closing:
        ours = closing.push(Ours(root / "ours", state, {}))
        new = RawFile(root / "new", state, {}, threads)
        return alternate(
            {OURS: ours.save, RAW_NEW: new.write},
            before={OURS: ours.start_anew},
            after={OURS: ours.settle, RAW_NEW: new.remove},
            rounds=rounds,
            warm_up=min(1, rounds - 1),
        )


def saves_and_loads(state: State, rounds: int) -> tuple[Results, Results]:
    """Ours and stock's, in turn: results by `OURS`, `STOCK` and, of loads, `STOCK_READER`."""
    into = cleared(state)
    with memory_folder() as root, Ours(root / "ours", state, into) as ours:
        stock = Stock(root / "stock", state, into)
        saves = alternate(
            {OURS: ours.save, STOCK: stock.save}, after={OURS: ours.settle}, rounds=rounds, warm_up=2
        )
        loads = alternate({OURS: ours.load, STOCK_READER: stock.load}, rounds=rounds)
        ours.load()
        check(into, state)
    return saves, loads


def _on_disk(state: State, rounds: int) -> Results:
    """In the folder for temporary files; a save is synced before it is acknowledged."""
    with _disk_folder() as root, two_threads() as threads, Ours(root / "ours", state, {}) as ours:
        new = RawFile(root / "new", state, {}, threads, sync=True)
        return alternate(
            {OURS: ours.save, RAW_SYNCED: new.write},
            after={OURS: ours.settle, RAW_SYNCED: new.remove},
            rounds=rounds,
            warm_up=2,
        )


@contextmanager
def _disk_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as folder:
        yield Path(folder)


def _row(what: str, results: Results, against: str, goal: float | None = None) -> Row:
    return Row(
        what=what,
        unit="ms",
        ours=results[OURS].median_s * 1e3,
        bare=results[against].median_s * 1e3,
        against=against,
        goal=None if goal is None else Goal(bound=goal),
    )
