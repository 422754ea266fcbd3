"""Which checkpoints of a run stay. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

StepState = Literal["saving", "cached", "replicated", "durable", "failed", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One checkpoint of a run, by its step.

    "saving": being written, or begun and never committed. "cached", "replicated": restorable from the pool, from one
    server or from any of several. "durable": restorable from storage. "failed": restorable from the pool, but its
    upload met an error. "broken": not restorable, `problem` says why. Sizes are bytes.
    """

    step: int
    uri: str
    state: StepState
    bytes: int = 0
    problem: str = ""

    @property
    def restorable(self) -> bool:
        return self.state in ("cached", "replicated", "durable", "failed")


def superfluous(
    steps: Sequence[Step],
    *,
    keep_last: int | None,
    keep_every: int | None,
    needed: Collection[int | None] = (),
) -> list[Step]:
    """Those of `steps` that may go, oldest first; never one of the `needed`.

    Kept are the `keep_last` newest that are restorable (None: all), each whose step is a multiple of `keep_every`, and
    whatever else they are the newest durable one: until the upload of a newer one is done, it is all that a lost pool
    would leave. Steps that are not restorable go once a newer one is durable; one that is being saved is none of ours.
    """
    durable = max((s.step for s in steps if s.state == "durable"), default=None)
    newest = sorted((s.step for s in steps if s.restorable), reverse=True)
    kept = {*needed, *(newest if keep_last is None else newest[:keep_last])}
    if durable is not None:
        kept.add(durable)
    if keep_every:
        kept |= {step for step in newest if step % keep_every == 0}
    gone = []
    for step in sorted(steps, key=lambda s: s.step):
        if step.restorable:
            if step.step not in kept:
                gone.append(step)
        elif step.state == "broken" and durable is not None and step.step < durable and step.step not in kept:
            gone.append(step)
    return gone
