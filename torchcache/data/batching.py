"""collate: torch's default_collate, into memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.utils.data._utils.collate import collate as collate_by
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from torchcache.data.buffer_pool import default_buffers
from torchcache.data.memory import lease_at
from torchcache.data.sharing import shareable

LEAST_BYTES: Final = 128 * 1024
"""Smaller batches are torch's: there is little to gain."""


def collate(batch: Sequence[Any]) -> Any:
    """For a DataLoader's `collate_fn=`: what torch's `default_collate` makes of `batch`, in cheaper memory.

    Tensors are stacked in buffers of a BufferPool of 1 GB for each process, or not at all if they lie in one end to end
    already, as equally large samples of `from_files(output="tensor")` do. A batch of a worker reaches the process that
    trains without a copy, and its memory is the worker's to use again once nothing refers to the batch any more.
    """
    return collate_by(batch, collate_fn_map={**default_collate_fn_map, torch.Tensor: _collate_tensors})


def _collate_tensors(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    joined = _joined(batch)
    if joined is None:
        if not _fit_for_a_buffer(batch):
            stacked: torch.Tensor = collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
            return stacked
        first = batch[0]
        room = default_buffers.take(len(batch) * first.nbytes)
        joined = room.view(first.dtype).view(len(batch), *first.shape)
        torch.stack([*batch], out=joined)
    return shareable(joined)


def _fit_for_a_buffer(batch: Sequence[torch.Tensor]) -> bool:
    """Whether these are plain tensors in memory, alike, and many bytes."""
    first = batch[0]
    return len(batch) * first.nbytes >= LEAST_BYTES and all(
        tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        and tensor.device.type == "cpu"
        and tensor.dtype is first.dtype
        and tensor.shape == first.shape
        for tensor in batch
    )


def _joined(batch: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The batch as one tensor, if its tensors lie end to end in a buffer of a pool."""
    first = batch[0]
    if first.layout is not torch.strided or first.is_nested or first.dtype.is_complex:
        return None
    storage = first.untyped_storage()
    shape, dtype, step, at = first.shape, first.dtype, first.nbytes, first.data_ptr()
    size = len(batch) * step
    if size < LEAST_BYTES or lease_at(storage.data_ptr()) is None:
        return None
    if at + size > storage.data_ptr() + storage.nbytes():
        return None
    for tensor in batch:  # what lies within the first one's storage is of the same buffer
        if (
            tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.data_ptr() != at
            or tensor.shape != shape
            or tensor.dtype is not dtype
            or not tensor.is_contiguous()
            or tensor.requires_grad
            or tensor.is_neg()
        ):
            return None
        at += step
    return first.as_strided((len(batch), *shape), (first.numel(), *first.stride()))
