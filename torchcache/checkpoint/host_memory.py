"""Memory that saves and loads take beside the state: for what can't be written from, or received, where it lies."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Final

import torch

from torchcache.checkpoint.frame import has_row_major_bytes
from torchcache.errors import ConfigurationError
from torchcache.mappings import HUGE_BYTES, new_memory

EXTRA_MEMORY_BYTES: Final = 512 * 1024 * 1024


def checked_bound(extra_memory_bytes: object) -> int:
    """What users give as `extra_memory_bytes`. Raises ConfigurationError."""
    if type(extra_memory_bytes) is not int or extra_memory_bytes < 1:
        raise ConfigurationError(f"extra_memory_bytes={extra_memory_bytes!r}: give 1 or more")
    return extra_memory_bytes


class Room:
    """So many bytes, given out and given back. What is larger than all of it is let in alone. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._taken = 0
        self.most_taken = 0
        self._changed = threading.Condition()

    def take(self, need_bytes: int) -> None:
        """Waits until there are so many."""
        with self._changed:
            self._changed.wait_for(
                lambda: not need_bytes or not self._taken or self._taken + need_bytes <= self._size
            )
            self._taken += need_bytes
            self.most_taken = max(self.most_taken, self._taken)

    def correct(self, guessed_bytes: int, bytes: int) -> None:
        """Of what was taken by a guess, so many turned out to be needed. Doesn't wait."""
        self.give_back(guessed_bytes - bytes)
        self.most_taken = max(self.most_taken, self._taken)

    def give_back(self, bytes: int) -> None:
        with self._changed:
            self._taken -= bytes
            self._changed.notify_all()


def copied_bytes(tensor: torch.Tensor) -> int:
    """What a copy of a tensor in the host's memory takes; 0 if its own bytes can be written from where they are."""
    is_plain = has_row_major_bytes(tensor) and not (tensor.is_conj() or tensor.is_neg())
    if is_plain and tensor.is_cpu and tensor.is_contiguous():
        return 0
    return tensor.numel() * tensor.dtype.itemsize


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty`. A large one is of huge pages, which cost half to be filled; its storage can't be resized."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = new_memory(size)
    except OSError as error:
        raise MemoryError(f"there are no {size:,} bytes of memory for a tensor") from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, those of a GPU in pinned memory: all copies are under way before the first is waited for.

    torch keeps pinned memory that was given back for whoever asks next, so that it is pinned once.
    """
    on_gpu = {tensor.device for tensor in tensors if tensor.is_cuda}
    found = [_to_pinned(tensor) if tensor.is_cuda else tensor for tensor in tensors]
    for device in on_gpu:
        torch.cuda.current_stream(device).synchronize()
    return found


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    if not has_row_major_bytes(tensor):
        return tensor.detach().cpu()
    source = tensor.detach().resolve_conj().resolve_neg()
    pinned = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(source, non_blocking=True)
