"""What of a state is copied where: tensors one behind the other, each once, however often it is in the state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from torchcache.checkpoint.frame import has_row_major_bytes
from torchcache.checkpoint.layout import align

Wanted = tuple[int, torch.dtype, torch.Size, int]
"""Offset in bytes, dtype, shape, elements."""


class Plan:
    """The copy of one state: `size` bytes."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._sources: list[torch.Tensor] = []
        self._wanted: list[Wanted] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self.size = 0
        self.has_dtensors = False
        self._tree = {key: self._note(value) for key, value in state.items()}

    def _note(self, value: Any) -> Callable[[list[torch.Tensor]], Any]:
        """Plans the copy of a value; what is returned makes it, from the staged tensors."""
        if isinstance(value, DTensor):
            self.has_dtensors = True
            number, mesh, placements = self._number(value.to_local()), value.device_mesh, value.placements
            shape, stride = value.shape, value.stride()
            return lambda staged: DTensor.from_local(
                staged[number], mesh, placements, run_check=False, shape=shape, stride=stride
            )
        if isinstance(value, torch.Tensor):
            if not has_row_major_bytes(value) or value.is_meta:
                return lambda _: value.detach().clone()
            number = self._number(value)
            return lambda staged: staged[number]
        if isinstance(value, Mapping):
            parts = {key: self._note(inner) for key, inner in value.items()}
            return lambda staged: {key: make(staged) for key, make in parts.items()}
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            kind, items = type(value), [self._note(inner) for inner in value]
            return lambda staged: kind(make(staged) for make in items)
        copied = copy.deepcopy(value)
        return lambda _: copied

    def _number(self, tensor: torch.Tensor) -> int:
        shape, dtype = tensor.shape, tensor.dtype
        # The same elements from the same place are the same; a lazy conjugate is not.
        lazily = dtype.is_complex and tensor.is_conj(), tensor.is_neg()
        key = (tensor.data_ptr(), dtype, shape, tensor.stride(), tensor.device, lazily)
        if tensor.numel() and key in self._known:
            return self._known[key]
        number = self._known[key] = len(self._sources)
        start = align(self.size)
        self._sources.append(tensor)
        self._wanted.append((start, dtype, shape, tensor.numel()))
        self.size = start + tensor.nbytes
        return number

    def carry_out(self, places: Callable[[Sequence[Wanted]], list[torch.Tensor]]) -> dict[str, Any]:
        """Copies everything, and returns the state of the copies when they are all there."""
        staged = places(self._wanted)
        targets, sources = staged, self._sources
        if any(target.dtype.itemsize == 1 for target in staged):
            # Not every dtype of a byte can be copied; as bytes all can.
            targets, sources = [list(map(_as_bytes, tensors)) for tensors in (staged, self._sources)]
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources, non_blocking=True)
        for device in {source.device for source in self._sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {key: make(staged) for key, make in self._tree.items()}


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
