"""From what a user gives as state to what torch saves, and into what it loads: all that was saved, nothing less."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.checkpoint.stateful import Stateful

from torchcache.checkpoint.resume import PREFIX
from torchcache.checkpoint.stored import Backing
from torchcache.errors import CheckpointError

_STATE: Final = "state"


def as_dict(value: object) -> Any:
    """A value of the state as torch is to save it: the state_dict of what has one, all else as it is.

    An optimizer numbers its parameters; torch's checkpoints know only names, so numbers become texts.
    """
    if isinstance(value, torch.Tensor):  # by far the most; to ask for a protocol takes long
        return value
    if isinstance(value, torch.optim.Optimizer):
        state = value.state_dict()
        return {**state, _STATE: {str(number): entry for number, entry in state[_STATE].items()}}
    return value.state_dict() if isinstance(value, Stateful) else value


def give_back(state: MutableMapping[str, Any], key: str, loaded: Any) -> None:
    """Hands what was loaded for `key` to its object, or puts it into `state`."""
    value = state[key]
    if isinstance(value, torch.optim.Optimizer):
        entries = {int(number): entry for number, entry in loaded[_STATE].items()}
        value.load_state_dict({**loaded, _STATE: entries})
    elif isinstance(value, Stateful):
        value.load_state_dict(loaded)
    else:
        state[key] = loaded


def prepare(value: object, metadata: Metadata, key: str) -> Any:
    """As `as_dict`, of what is to be loaded. A new optimizer has no state to load into yet: it is given one."""
    if isinstance(value, torch.optim.Optimizer) and not value.state:
        prefix = f"{key}.{_STATE}."
        if any(name.startswith(prefix) for name in metadata.state_dict_metadata):
            _initialise(value)
    return as_dict(value)


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    _init_optim_state(optimizer)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def complete(target: dict[str, Any], backing: Backing) -> None:
    """Adds to `target` what the checkpoint holds under its keys and it has no place for: else it would be left out.

    A place that holds None is none, for a tensor.

    Raises CheckpointError if the checkpoint doesn't say where in the state its entries belong, IntegrityError if it
    claims tensors larger than what is stored of them.
    """
    metadata = backing.metadata
    there, _ = flatten_state_dict(target)
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data or {}
    places: dict[str, tuple[str | int, ...]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        missing = name not in there or (there[name] is None and isinstance(entry, TensorStorageMetadata))
        if not missing or name.startswith(f"{PREFIX}."):
            continue
        path = paths.get(name)
        if path is None:
            if name in target or name.partition(".")[0] in target:
                raise CheckpointError(f"the checkpoint holds {name!r}, which the state has no place for")
            continue
        if path[0] not in target:
            continue  # the user asked for less
        places[name] = path
    backing.require(
        [name for name in places if isinstance(metadata.state_dict_metadata[name], TensorStorageMetadata)]
    )
    for name, path in places.items():
        entry, place = metadata.state_dict_metadata[name], None
        if isinstance(entry, TensorStorageMetadata):
            place = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        set_element(target, path, place)
