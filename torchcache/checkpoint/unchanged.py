"""Whether a tensor is what it was at an earlier save, by the checksums of that."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Final

import torch
import xxhash
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from torchcache.checkpoint.frame import bytes_of, has_row_major_bytes
from torchcache.checkpoint.layout import GRANULE_BYTES, cut
from torchcache.checkpoint.manifest import probe_digest, probe_ranges
from torchcache.checkpoint.metadata import dtype_name
from torchcache.checkpoint.reuse import LEAST_COMPARED_BYTES, KeptItem, Written
from torchcache.model import ByteRange
from torchcache.threads import Threads

_COMPARED_AT_A_TIME: Final = 64


def find_unchanged(
    items: Sequence[WriteItem],
    sizes: Sequence[int],
    resolve: Callable[[WriteItem], torch.Tensor | io.BytesIO],
    before: Written,
    *,
    threads: int,
) -> dict[int, KeptItem]:
    """Those of `items`, by their number, that are the same as in `before`, and where they lie.

    `sizes` are what they are expected to take, in bytes. Asks `resolve` in this thread alone.
    """
    found: dict[int, KeptItem] = {}
    under_way: deque[tuple[int, KeptItem, Future[bool]]] = deque()

    def settle() -> None:
        number, item, same = under_way.popleft()
        if same.result():
            found[number] = item

    with Threads(threads, name="torchcache-compare") as pool:
        for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
            if item.type == WriteItemType.BYTE_IO or size < LEAST_COMPARED_BYTES:
                continue
            offset = None if item.index.offset is None else tuple(item.index.offset)
            was = before.find(item.index.fqn, offset, item.index.index)
            if was is None or was.payload_length != size:
                continue
            data = resolve(item)
            if isinstance(data, torch.Tensor):
                if data.is_cuda:  # the threads have streams of their own, which don't wait for the caller's
                    torch.cuda.current_stream(data.device).synchronize()
                under_way.append((number, was, pool.submit(is_unchanged, data, was)))
            if len(under_way) >= _COMPARED_AT_A_TIME:
                settle()
        while under_way:
            settle()
    return found


def is_unchanged(tensor: torch.Tensor, was: KeptItem) -> bool:
    """Whether the tensor has the type, shape and checksums that `was` had. Ends at the first piece that differs."""
    if not has_row_major_bytes(tensor) or not tensor.is_contiguous() or tensor.is_meta:
        return False
    if tensor.is_conj() or tensor.is_neg():
        return False
    if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (was.dtype, was.shape):
        return False
    if tensor.nbytes != was.payload_length:
        return False
    if was.probe and probe_digest(_parts(tensor, probe_ranges(tensor.nbytes))) != was.probe:
        return False
    whole = cut(ByteRange(0, tensor.nbytes), GRANULE_BYTES)
    return all(
        xxhash.xxh3_64_intdigest(piece) == digest
        for piece, digest in zip(_parts(tensor, whole), was.digests, strict=True)
    )


def _parts(tensor: torch.Tensor, ranges: Iterable[ByteRange]) -> Iterator[memoryview]:
    """Bytes of a contiguous tensor; on a GPU each part is copied to the host when it is asked for."""
    if tensor.is_cpu:
        memory = bytes_of(tensor)
        for part in ranges:
            yield memory[part.start : part.end]
        return
    flat, size = tensor.detach().reshape(-1), tensor.dtype.itemsize
    for part in ranges:
        yield bytes_of(flat[part.start // size : part.end // size].cpu())
