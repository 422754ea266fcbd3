"""What belongs to one rank's point of resumption beside the model: data loaders, random numbers, which data it was.

It travels in the checkpoint as one tensor of bytes a rank, `_torchcache.rank-<n>`, which stock readers pass by. What
these bytes hold torch's weights_only loading takes: it is tried when they are made, not when they are needed.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import torch

from torchcache.errors import CheckpointError, IntegrityError

PREFIX: Final = "_torchcache"
"""First part of the names that the manager adds to a checkpoint."""

_FORMAT: Final = 1
_WRAPPERS: Final = 8


def record_name(rank: int) -> str:
    """The key of a rank's record, next to the user's own."""
    return f"{PREFIX}.rank-{rank}"


@dataclass(slots=True, kw_only=True)
class Record:
    """One rank's own part: `positions` are those of its data loaders, `datasets` say of which samples."""

    world_size: int
    positions: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    rng: dict[str, Any] | None = None

    def encode(self) -> torch.Tensor:
        """As a tensor of bytes. Raises CheckpointError, naming what, if something in it could not be read back."""
        content = {
            "format": _FORMAT,
            "world_size": self.world_size,
            "positions": self.positions,
            "datasets": self.datasets,
            "rng": self.rng,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"the state of {', '.join(map(repr, self._unsafe())) or 'a data loader'} holds something that can't be "
                f"loaded safely again: {_first_line(error)}. Let its state_dict hold tensors, numbers, texts, bytes, "
                "lists, tuples and dicts"
            ) from error
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def _unsafe(self) -> Iterable[str]:
        for name, state in self.positions.items():
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            try:
                torch.load(buffer, weights_only=True)
            except Exception:  # noqa: BLE001 - the name is all that is wanted
                yield name

    @classmethod
    def decode(cls, data: torch.Tensor, *, where: str) -> Record:
        """Raises IntegrityError for bytes that are no record."""
        try:
            content = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
            if content["format"] != _FORMAT:
                raise ValueError(f"it is of format {content['format']!r}")
            return cls(
                world_size=int(content["world_size"]),
                positions=dict(content["positions"]),
                datasets=dict(content["datasets"]),
                rng=content["rng"],
            )
        except Exception as error:
            raise IntegrityError(
                f"what {where} says of data loaders and random numbers can't be read: {_first_line(error)}",
                object=where,
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


# ---- data ----


def is_loader(value: object) -> bool:
    """Whether a value of the state is torchdata's StatefulDataLoader, whose state is each rank's own."""
    module = sys.modules.get("torchdata.stateful_dataloader")
    return module is not None and isinstance(value, module.StatefulDataLoader)


def position_of(loader: Any) -> dict[str, Any]:
    """Where a loader stands, the epoch that its sampler was told, and its own generator, which draws the order of the
    epochs to come."""
    generator = loader.generator
    sampler = _sampler_with_epochs(loader)
    return {
        "loader": loader.state_dict(),
        "generator": generator.get_state() if isinstance(generator, torch.Generator) else None,
        "epoch": int(sampler.epoch) if sampler is not None else None,
    }


def go_to(loader: Any, position: Mapping[str, Any]) -> None:
    """Puts a loader where `position_of` found it; random states are to be set after this.

    Making the iterator draws random numbers that the loader of the first run had drawn before it was saved. So it is
    made here, by asking for the state; the next `iter(loader)` takes that one. Its workers are asked for batches at
    once, by the order of the sampler's epoch: that is set before, and the caller's own `set_epoch` comes to the same.
    """
    sampler, epoch = _sampler_with_epochs(loader), position.get("epoch")
    if sampler is not None and epoch is not None:
        sampler.set_epoch(epoch)
    loader.load_state_dict(position["loader"])
    loader.state_dict()
    if position["generator"] is not None and isinstance(loader.generator, torch.Generator):
        loader.generator.set_state(position["generator"])


def _sampler_with_epochs(loader: Any) -> Any | None:
    """The sampler of a loader that draws another order for each epoch that it is told; None if there is none."""
    batch_sampler = loader.batch_sampler
    for sampler in (loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        if callable(getattr(sampler, "set_epoch", None)) and isinstance(getattr(sampler, "epoch", None), int):
            return sampler
    return None


def identity_of(value: object) -> dict[str, Any] | None:
    """Which samples a dataset, or the one that a loader or a subset wraps, consists of; None if none can tell."""
    for _ in range(_WRAPPERS):
        identity = getattr(value, "identity", None)
        if callable(identity) and not isinstance(value, torch.nn.Module):
            return dict(identity())
        if not hasattr(value, "dataset"):
            return None
        value = value.dataset
    return None


def require_same_data(
    saved: Mapping[str, Mapping[str, Any]], state: Mapping[str, object], where: str
) -> None:
    """Raises CheckpointError naming the first dataset whose samples are others than when it was saved."""
    for name, then in saved.items():
        now = identity_of(state[name]) if name in state else None
        if now is None or now == dict(then):
            continue
        changed = [
            f"{k} was {then.get(k)!r}, is {now.get(k)!r}"
            for k in {**then, **now}
            if then.get(k) != now.get(k)
        ]
        raise CheckpointError(
            f"the dataset of {name!r} has changed since {where} was saved ({'; '.join(changed)}): its position would "
            "mean other samples. Resume with the dataset it was saved with, or load without this entry",
            object=where,
        )


# ---- random numbers ----


def rng_state() -> dict[str, Any]:
    """The states of the global generators of torch (also of all CUDA devices, once in use), numpy and Python."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        states = state["cuda"]
        if isinstance(states, torch.Tensor):  # as it was until 0.1: of the device that was current
            torch.cuda.set_rng_state(states)
        else:
            torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])
