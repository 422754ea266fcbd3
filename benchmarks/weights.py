"""Weights out of a safetensors file that the pool holds: ours beside safetensors itself, Run:ai's streamer and preadv.

Each contender gives tensors whose every page was read: a mapping that nobody has touched yet is no load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

import torchcache as tc
from benchmarks.bare_files import read_whole
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import local_pool, memory_folder
from benchmarks.rounds import alternate
from benchmarks.states import State, check, large_state, size_of

OURS: Final = "torchcache"
STOCK: Final = "safetensors.torch.load_file"
STREAMER: Final = "runai-model-streamer"
RAW: Final = "preadv, 2 threads, into new memory"
GOALS: Final = {STOCK: 1.5, STREAMER: 1.5, RAW: 0.8}
_PAGE: Final = 4096


def measure(scale: Scale) -> Findings:
    """Every load gives new tensors."""
    state = large_state(3, 1 << 16) if scale.tiny else large_state(128, 8 << 20)
    size = size_of(state)
    with memory_folder() as root:
        path = root / "source" / "model.safetensors"
        path.parent.mkdir()
        save_file(state, path)
        with local_pool(root / "pool", capacity_bytes=2 * size + (1 << 28)) as warm, _raw(path) as raw:
            readers: dict[str, Callable[[], State]] = {
                OURS: lambda: tc.load_safetensors(f"file://{path}", pool=warm.pool),
                STOCK: lambda: load_file(path),
                RAW: raw,
            }
            if find_spec("runai_model_streamer"):
                readers[STREAMER] = lambda: _streamed(path)
            check(readers[OURS](), state)
            results = alternate(
                {name: _touching(read, size) for name, read in readers.items()}, rounds=scale.rounds
            )
    rows = [
        Row(
            what=f"load_safetensors of {size / 1e9:.2f} GB, warm",
            unit="ms",
            ours=results[OURS].median_s * 1e3,
            bare=results[other].median_s * 1e3,
            against=other,
            goal=Goal(bound=GOALS[other]),
        )
        for other in results
        if other != OURS
    ]
    return Findings(title="Weights", rows=rows, contenders={f"{size / 1e9:.2f} GB": list(results.values())})


def _touching(read: Callable[[], State], size: int) -> Callable[[], int]:
    def work() -> int:
        for tensor in read().values():
            tensor.view(torch.uint8).flatten()[::_PAGE].max()
        return size

    return work


def _streamed(path: Path) -> State:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return dict(streamer.get_tensors())


@contextmanager
def _raw(path: Path) -> Iterator[Callable[[], State]]:
    """The file's bytes, headers and all, into one tensor that is new each time."""
    file, size = os.open(path, os.O_RDONLY), path.stat().st_size
    with ThreadPoolExecutor(2) as threads:

        def read() -> State:
            memory = torch.empty(size, dtype=torch.uint8)
            view: Any = memoryview(memory.numpy())
            middle = size // 2
            done = threads.map(read_whole, (file, file), (view[:middle], view[middle:]), (0, middle))
            if sum(done) != size:
                raise RuntimeError("the file is shorter than it was")
            return {"all": memory}

        yield read
    os.close(file)
