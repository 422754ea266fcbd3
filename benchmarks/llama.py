"""A rank's checkpoint as MLPerf Storage v2.0 has it of Llama 3 8B on eight ranks, scaled to this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.checkpoints import OURS, STOCK, STOCK_READER, Results, saves_and_loads
from benchmarks.findings import Findings, Row, Scale
from benchmarks.states import State, size_of

ALLUXIO: Final = "Alluxio, all of the system it submitted to MLPerf"
ALLUXIO_WRITE_GIB_S: Final = 4.54
ALLUXIO_READ_GIB_S: Final = 4.29
"""Told, and not measured: rows name them without a ratio."""

RANKS: Final = 8
GIB: Final = 1 << 30
_MOMENTS: Final = ("master", "exp_avg", "exp_avg_sq")
"""Of each weight, which is bfloat16, the optimizer keeps so many of float32: 14 bytes a parameter in all."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of so many layers, and the rows of its two embeddings."""

    layers: int
    hidden: int = 4096
    keys: int = 1024
    inner: int = 14336
    vocabulary: int

    def weights(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and shape of each weight, whole; norms are a row."""
        hidden, keys, inner = self.hidden, self.keys, self.inner
        yield "embed_tokens", (self.vocabulary, hidden)
        for number in range(self.layers):
            layer = f"layers.{number}"
            yield f"{layer}.attention.q", (hidden, hidden)
            yield f"{layer}.attention.k", (keys, hidden)
            yield f"{layer}.attention.v", (keys, hidden)
            yield f"{layer}.attention.o", (hidden, hidden)
            for name in ("gate", "up", "down"):
                yield f"{layer}.mlp.{name}", (inner, hidden)
            for name in ("input", "post_attention"):
                yield f"{layer}.{name}_norm", (1, hidden)
        yield "norm", (1, hidden)
        yield "lm_head", (self.vocabulary, hidden)

    @property
    def rank_bytes(self) -> int:
        """What one of the ranks saves."""
        return sum(14 * rows * columns // RANKS for _, (rows, columns) in self.weights())


WHOLE: Final = Shape(layers=32, vocabulary=128_256)
SIXTEENTH: Final = Shape(layers=2, vocabulary=128_256 // 16)
TINY: Final = Shape(layers=1, hidden=64, keys=16, inner=224, vocabulary=512)


def measure(scale: Scale) -> Findings:
    """Saves that replace one another, and loads: in GiB/s, and for each core of this machine."""
    shape = TINY if scale.tiny else SIXTEENTH
    state = rank_state(shape)
    saves, loads = saves_and_loads(state, scale.rounds)
    part = f"{size_of(state) / GIB:.2f} GiB"
    rows = [
        *_rows(f"save of {part}", saves, STOCK, ALLUXIO_WRITE_GIB_S),
        *_rows(f"load of {part}", loads, STOCK_READER, ALLUXIO_READ_GIB_S),
    ]
    note = (
        f"One rank, of which this is {size_of(state) / WHOLE.rank_bytes:.1%} of {WHOLE.rank_bytes / GIB:.2f} GiB; "
        f"{_cores()} cores for client and server together."
    )
    contenders = {"save, from the second on": list(saves.values()), "load": list(loads.values())}
    return Findings(title="A rank of Llama 3 8B", rows=rows, contenders=contenders, note=note)


def rank_state(shape: Shape) -> State:
    """What one rank holds: an eighth of each weight, and of what the optimizer keeps of it."""
    chance = torch.Generator().manual_seed(0)
    state: State = {}
    for name, (rows, columns) in shape.weights():
        elements = rows * columns // RANKS
        state[f"model.{name}"] = torch.rand(elements, generator=chance).bfloat16()
        for moment in _MOMENTS:
            state[f"optimizer.{moment}.{name}"] = torch.rand(elements, generator=chance)
    return state


def _rows(what: str, results: Results, against: str, alluxio_gib_s: float) -> list[Row]:
    ours, stock = (results[name].bytes / results[name].median_s / GIB for name in (OURS, against))
    cores = _cores()
    return [
        Row(what=what, unit="GiB/s", ours=ours, bare=stock, against=against, better="more"),
        Row(what=what, unit="GiB/s", ours=ours, against=f"{ALLUXIO}: {alluxio_gib_s:.2f} GiB/s"),
        Row(what=f"{what}, a core", unit="GiB/s", ours=ours / cores),
    ]


def _cores() -> int:
    return os.cpu_count() or 1
