"""From a safetensors entry and an index to the box of bytes that torch wants of it. Pure."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Final, NamedTuple

import torch

from torchcache.checkpoint.layout import Box
from torchcache.checkpoint.manifest import Item
from torchcache.checkpoint.safetensors_header import Entry
from torchcache.errors import CheckpointError

_TORCH_NAMES: Final = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
"""This torch's dtype for each of the format's; it has none for the six-bit ones."""


class StoredTensor(NamedTuple):
    """A tensor and where it lies; sorts by that. Of a file's tensors only empty ones share a start."""

    file: str
    start: int
    name: str
    entry: Entry


def torch_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """The shape that torch gives the tensor. Raises CheckpointError if its packed elements don't fill whole rows."""
    entry = tensor.entry
    if entry.dtype != "F4":
        return entry.shape
    if not entry.shape or entry.shape[-1] % 2:
        raise CheckpointError(
            f"{tensor.name!r}: torch packs two F4 elements in a byte, and a row of it has an odd one"
        )
    return (*entry.shape[:-1], entry.shape[-1] // 2)


def item_of(tensor: StoredTensor, shape: tuple[int, ...]) -> Item:
    """The tensor as an item of its file, without checksums: the format has none."""
    return Item(
        name=tensor.name,
        offset=None,
        index=None,
        kind="tensor",
        dtype=tensor.entry.dtype,
        shape=shape,
        file=tensor.file,
        start=tensor.start,
        length=tensor.entry.bytes.length,
        payload_start=0,
        payload_length=tensor.entry.bytes.length,
        frame_digest=0,
        digests=(),
    )


def box_of(shape: tuple[int, ...], index: Any) -> tuple[Box, tuple[int | slice, ...]]:
    """The box of a tensor of `shape` that holds all that `index` takes, and what to index the box with after that.

    `index` is an integer, a slice, `...`, or a tuple of them; the second is empty where the box is just what is wanted.
    Raises IndexError.
    """
    parts = _spread(index if isinstance(index, tuple) else (index,), len(shape))
    offsets: list[int] = []
    lengths: list[int] = []
    then: list[int | slice] = []
    for size, part in zip(shape, parts, strict=True):
        if isinstance(part, slice):
            taken = range(*part.indices(size))
            if taken.step < 0:
                raise IndexError("a slice of a tensor needs a step of 1 or more")
            offsets.append(taken.start if taken else 0)
            lengths.append(taken[-1] + 1 - taken.start if taken else 0)
            then.append(slice(None, None, taken.step))
        else:
            if not -size <= part < size:
                raise IndexError(f"{part} is out of range in a dimension of {size}")
            offsets.append(part % size)
            lengths.append(1)
            then.append(0)
    whole = all(isinstance(part, slice) and part.step == 1 for part in then)
    return Box(shape, tuple(offsets), tuple(lengths)), () if whole else tuple(then)


def _spread(index: tuple[Any, ...], dimensions: int) -> list[int | slice]:
    """One integer or slice for each dimension."""
    parts: list[int | slice] = []
    dots = sum(part is ... for part in index)
    left = dimensions - (len(index) - dots)
    if left < 0 or dots > 1:
        raise IndexError(f"{len(index)} indices for a tensor of {dimensions} dimensions")
    for part in index:
        if isinstance(part, EllipsisType):
            parts += [slice(None)] * left
        elif isinstance(part, slice) or (isinstance(part, int) and not isinstance(part, bool)):
            parts.append(part)
        else:
            raise IndexError(f"only integers, slices and ... index a tensor in a file, not {part!r:.80}")
    return parts + [slice(None)] * (dimensions - len(parts))
