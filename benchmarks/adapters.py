"""Checkpoints of a run that trains adapters over frozen weights: what a save sends and stores of what didn't change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from benchmarks.checkpoints import SIZE, TINY, Size
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import memory_folder
from benchmarks.rounds import Result, alternate
from benchmarks.savers import Ours
from benchmarks.states import State, check, cleared, large_state, size_of

REUSING: Final = "torchcache"
WHOLE: Final = "torchcache, all of it written"
CHANGING: Final = "torchcache, where everything changed"
WHOLE_CHANGING: Final = "torchcache, everything changed, never compared"
_PART: Final = 192
"""Of each weight's bytes its two adapters have so small a part each, and Adam two moments of each."""

MOST_PERCENT: Final = 5.0


def measure(scale: Scale) -> Findings:
    """What a second save sends and stores, and what each costs; then what comparing costs where it is in vain."""
    size = TINY if scale.tiny else SIZE
    state = adapter_state(size)
    trained = sum(tensor.nbytes for name, tensor in state.items() if _is_trained(name))
    what = f"{size_of(state) / 1e9:.2f} GB, of which {trained / size_of(state):.1%} change"
    sent, stored = _shares(state)
    saves = _saves(state, scale.rounds)
    vain = _in_vain(size, scale.rounds)
    rows = [
        _percent(f"sent by the second save of {what}", sent),
        _percent(f"stored for the second save of {what}", stored),
        _row(f"save of {what}", saves[REUSING], saves[WHOLE]),
        _row("save of a state of which everything changed", vain[CHANGING], vain[WHOLE_CHANGING]),
    ]
    contenders = {"adapters": list(saves.values()), "everything changed": list(vain.values())}
    return Findings(title="Checkpoints of adapters", rows=rows, contenders=contenders)


def adapter_state(size: Size) -> State:
    """Frozen weights, two small adapters to each, and behind them the moments that an optimizer keeps of those."""
    frozen = large_state(size.tensors, size.tensor_bytes)
    state: State = {}
    moments: State = {}
    for name, weight in frozen.items():
        state[name] = weight
        for adapter in ("lora_A", "lora_B"):
            state[f"{name}.{adapter}"] = torch.rand(max(1, weight.numel() // _PART))
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[f"optimizer.{name}.{adapter}.{moment}"] = torch.rand(max(1, weight.numel() // _PART))
    return {**state, **moments}


def train(state: State) -> None:
    """A step: everything that is trained changes."""
    for name, tensor in state.items():
        if _is_trained(name):
            tensor.add_(1)


def _is_trained(name: str) -> bool:
    return "lora" in name


def _shares(state: State) -> tuple[float, float]:
    """What the second save sends and stores, in percent of what the first did."""
    into = cleared(state)
    with memory_folder() as root, Ours(root / "ours", state, into, reuse=True) as ours:
        ours.save()
        sent, stored = ours.sent_bytes, ours.stored_bytes
        ours.settle()
        train(state)
        ours.save()
        more_sent = ours.sent_bytes - sent
        more_stored = ours.stored_bytes - stored
        ours.load()
        check(into, state)
    return 100 * more_sent / sent, 100 * more_stored / stored


def _saves(state: State, rounds: int) -> dict[str, Result]:
    """One after the other, each behind a step of training."""
    with memory_folder() as root:
        return _compare(root, state, REUSING, WHOLE, rounds, lambda: train(state))


def _in_vain(size: Size, rounds: int) -> dict[str, Result]:
    state = large_state(size.tensors, size.tensor_bytes)

    def change() -> None:
        for tensor in state.values():
            tensor.add_(1)

    with memory_folder() as root:
        return _compare(root, state, CHANGING, WHOLE_CHANGING, rounds, change)


def _compare(
    root: Path, state: State, reusing: str, whole: str, rounds: int, step: Callable[[], None]
) -> dict[str, Result]:
    with Ours(root / "reusing", state, {}, reuse=True) as ours, Ours(root / "whole", state, {}) as other:
        return alternate(
            {reusing: ours.save, whole: other.save},
            before={reusing: step, whole: step},
            after={reusing: ours.settle, whole: other.settle},
            rounds=rounds,
            warm_up=2,
        )


def _percent(what: str, value: float) -> Row:
    return Row(
        what=what,
        unit="% of the first",
        ours=value,
        goal=Goal(bound=MOST_PERCENT, of="value", sense="at most"),
    )


def _row(what: str, ours: Result, other: Result) -> Row:
    return Row(what=what, unit="ms", ours=ours.median_s * 1e3, bare=other.median_s * 1e3, against=other.name)
