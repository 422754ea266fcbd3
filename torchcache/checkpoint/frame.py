"""torch.save blobs without torch.save: the zip around a tensor's bytes, made without them, and the bytes themselves."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Final, cast

import torch

from torchcache.errors import CheckpointError

_OF_NUMPY: Final = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
}
"""Dtypes that a memoryview knows too: a third of the way."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`head` + the tensor's elements, row-major + `tail` is what torch.load takes. (The zip's CRC of the payload is 0;
    torch's reader does not look at it.)"""

    head: bytes
    tail: bytes


class _Sink(io.RawIOBase):
    """Takes what torch.save writes; remembers the one hole that `skip_data` seeks over instead of filling it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = (bytearray(), bytearray())
        self.hole_bytes: int | None = None

    def write(self, data: object) -> int:
        content = memoryview(data)  # type: ignore[arg-type]
        self.parts[self.hole_bytes is not None].extend(content)
        return content.nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR or self.hole_bytes is not None:
            raise io.UnsupportedOperation("a frame has one hole")
        self.hole_bytes = offset
        return 0


@lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame | None:
    """The frame of a contiguous tensor; None if this torch makes it in another way than known here.

    Costs 0.1 ms the first time, and no memory of the tensor's size: what is saved is never touched, so its pages never
    come to be. See torch.serialization.skip_data (a prototype in torch); the zip's layout is that of caffe2/serialize's
    PyTorchStreamWriter, which aligns the payload to 64 bytes.
    """
    sink = _Sink()
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    with torch.serialization.skip_data():
        torch.save(tensor, cast(IO[bytes], sink))
    if (sink.hole_bytes or 0) != tensor.nbytes:
        return None
    head, tail = map(bytes, sink.parts)
    return Frame(head, tail)


def has_row_major_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no more than its elements: strided, not quantised, of no subclass with a mind of its own."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.dtype.itemsize * tensor.numel() == tensor.nbytes
    )


def row_major(tensor: torch.Tensor, *, name: str) -> torch.Tensor:
    """`tensor` in CPU memory, contiguous and without lazy conjugation; itself where it is so already."""
    if tensor.is_meta:
        raise CheckpointError(
            f"{name!r} is on the meta device and has no data to save; materialise it first", object=name
        )
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return tensor
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype: a writable view that keeps the memory alive."""
    if tensor.dtype in _OF_NUMPY and tensor.numel():
        plain = tensor.detach() if tensor.requires_grad else tensor
        return memoryview(plain.numpy()).cast("B")  # type: ignore[arg-type]
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    flat.set_(
        tensor.untyped_storage(), tensor.storage_offset() * tensor.dtype.itemsize, (tensor.nbytes,), (1,)
    )
    return memoryview(cast(bytearray, flat.numpy()))


def blob_of(tensor: torch.Tensor) -> memoryview:
    """The whole torch.save blob, for tensors that `has_row_major_bytes` refuses."""
    blob = io.BytesIO()
    torch.save(tensor.detach().cpu(), blob)
    return blob.getbuffer()
