"""From a load plan to what is fetched and where it goes: rows straight into their tensor where they can."""

from __future__ import annotations

import io
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from torchcache.checkpoint.compression import decompress
from torchcache.checkpoint.extensions import undo
from torchcache.checkpoint.frame import bytes_of, has_row_major_bytes
from torchcache.checkpoint.garbage import garbage_waits
from torchcache.checkpoint.host_memory import EXTRA_MEMORY_BYTES, new_tensor
from torchcache.checkpoint.layout import GRANULE_BYTES, Box, cut
from torchcache.checkpoint.manifest import Item
from torchcache.checkpoint.metadata import dtype_of
from torchcache.checkpoint.source import Fetch, Source
from torchcache.errors import CheckpointError
from torchcache.model import ByteRange
from torchcache.threads import Threads

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import ExtensionRegistry

_T = TypeVar("_T")

READ_BYTES = 8 * GRANULE_BYTES
"""At most so much is asked for in one read: what several threads share evenly."""

_EXTENTS_A_READ = 1024
_READERS = min(4, os.cpu_count() or 1)
_BATCHES_UNDER_WAY = 2 * _READERS


class Load(ABC):
    """A part of a plan that is fetched and finished together. `fetches` go first, in any thread; `finish` then talks to
    the planner, in the thread that loads."""

    fetches: list[Fetch]
    extra_bytes = 0
    """What it takes beside its target, until it is finished and forgotten."""

    @property
    def fetched_bytes(self) -> int:
        return sum(fetch.part.length for fetch in self.fetches)

    @abstractmethod
    def finish(self) -> None:
        """Hands what was fetched to the planner."""


class RowsLoad(Load):
    """A box of a tensor whose bytes lie row-major: only the bytes of the box are fetched."""

    def __init__(self, item: Item, request: ReadItem, planner: LoadPlanner) -> None:
        self._request = request
        self._planner = planner
        self._target = planner.resolve_tensor(request).detach()
        self._source: torch.Tensor | None = None
        assert item.dtype is not None and item.shape is not None  # noqa: S101 - the manifest checked it
        dtype, size = dtype_of(item.dtype), item.payload_length
        if size != math.prod(item.shape) * dtype.itemsize:
            raise CheckpointError(f"{item.name!r} has {size} bytes, too few or many for its shape")
        _check_size(self._target, request)
        is_whole = request.lengths == item.shape and not any(request.storage_offsets)
        if is_whole and _takes(
            self._target, dtype, size
        ):  # most are; a box for each takes as long as its bytes
            self.fetches = [Fetch(item, ByteRange(0, size), bytes_of(self._target))] if size else []
            return
        box = Box(item.shape, tuple(request.storage_offsets), tuple(request.lengths))
        if not box.fits:
            raise CheckpointError(f"the plan asks for {box} of {item.name!r}: that isn't in the checkpoint")
        self.fetches, self._source = fetch_box(item, box, dtype, self._target)
        self.extra_bytes = memory_of(self._source)

    def finish(self) -> None:
        if self._source is not None:
            self._target.copy_(self._source)
            self._source = None
        self._planner.commit_tensor(self._request, self._target)


def fetch_box(
    item: Item, box: Box, dtype: torch.dtype, target: torch.Tensor
) -> tuple[list[Fetch], torch.Tensor | None]:
    """What to fetch to have a box of an item: straight into `target` where that can be, and then None; else into a
    tensor that is to be copied to it."""
    reads = box.reads(dtype.itemsize)
    if not reads:
        return [], None
    first, span_bytes = reads[0].start, reads[-1].end - reads[0].start
    source: torch.Tensor | None = None
    if _takes(target, dtype, span_bytes):
        memory = bytes_of(target)
    else:
        rows = new_tensor([span_bytes // dtype.itemsize], dtype)
        source = rows.as_strided(box.lengths, box.strides)
        memory = bytes_of(rows)
    return [Fetch(item, part, memory[part.start - first : part.end - first]) for part in reads], source


def memory_of(source: torch.Tensor | None) -> int:
    """Bytes behind what `fetch_box` is to be copied from."""
    return 0 if source is None else source.untyped_storage().nbytes()


def _takes(target: torch.Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether `size` bytes, row-major elements of `dtype`, can be received straight into the memory of `target`."""
    return (
        size == target.nbytes
        and target.is_cpu
        and target.dtype == dtype
        and has_row_major_bytes(target)
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )


class BlobLoad(Load):
    """A torch.save blob of a tensor, fetched and loaded whole, for all requests that want some of it."""

    def __init__(
        self,
        item: Item,
        requests: Sequence[ReadItem],
        planner: LoadPlanner,
        *,
        registry: ExtensionRegistry | None,
    ) -> None:
        self._item = item
        self._registry = registry
        self._requests = requests
        self._planner = planner
        self._blob = bytearray(item.payload_length)
        self.fetches = _whole(item, self._blob)
        self.extra_bytes = _blob_bytes(item)

    def finish(self) -> None:
        blob = _unpacked(self._blob, self._item, self._registry)
        tensor = _load_safely(blob, self._item, map_location="cpu")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{self._item.name!r} is a {type(tensor).__name__} in the checkpoint, no tensor"
            )
        for request in self._requests:
            part = tensor
            for dimension, (offset, length) in enumerate(
                zip(request.storage_offsets, request.lengths, strict=True)
            ):
                if part.size(dimension) != length:
                    part = part.narrow(dimension, offset, length)
            target = self._planner.resolve_tensor(request).detach()
            _check_size(target, request)
            if not _says_all(target, part):
                raise CheckpointError(
                    f"{self._item.name!r} can't be loaded into a sparse tensor, or a quantised one of another scale: "
                    "save and load its parts",
                    object=self._item.name,
                )
            target.copy_(part)
            self._planner.commit_tensor(request, target)


def _says_all(target: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a copy's values are all: to what is detached it tells nothing of indices, or of scales."""
    if target.layout is not torch.strided:
        return False
    if not target.is_quantized:
        return True
    if not part.is_quantized or target.qscheme() != part.qscheme():
        return False
    if target.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return (target.q_scale(), target.q_zero_point()) == (part.q_scale(), part.q_zero_point())
    return (
        target.q_per_channel_axis() == part.q_per_channel_axis()
        and torch.equal(target.q_per_channel_scales(), part.q_per_channel_scales())
        and torch.equal(target.q_per_channel_zero_points(), part.q_per_channel_zero_points())
    )


class BytesLoad(Load):
    """Another object than a tensor. Without `allow_pickle` the planner, which unpickles it without any precaution, gets
    it only after torch's weights_only loader took it, and then as written anew from what that loader made."""

    def __init__(
        self,
        item: Item,
        request: ReadItem,
        planner: LoadPlanner,
        *,
        allow_pickle: bool,
        registry: ExtensionRegistry | None,
    ) -> None:
        self._item = item
        self._registry = registry
        self._request = request
        self._planner = planner
        self._allow_pickle = allow_pickle
        self._blob = bytearray(item.payload_length)
        self.fetches = _whole(item, self._blob)
        self.extra_bytes = _blob_bytes(item)

    def finish(self) -> None:
        blob = _unpacked(self._blob, self._item, self._registry)
        content = io.BytesIO(blob)
        if not self._allow_pickle:
            value = _load_safely(blob, self._item, map_location=None)
            content = io.BytesIO()
            torch.save(value, content)
            content.seek(0)
        self._planner.load_bytes(self._request, content)


def plan_loads(
    requests: Iterable[ReadItem],
    items: Mapping[MetadataIndex, Item],
    planner: LoadPlanner,
    *,
    require: Callable[[Item], None],
    allow_pickle: bool,
    registry: ExtensionRegistry | None = None,
) -> Iterator[Load]:
    """The loads of a plan, in the order of the files. Made one by one: each may allocate what it loads into.

    `require` raises for an item that can't be where it is said to be, before memory is made for it.
    """
    found = [(_item_of(items, request), request) for request in requests]
    found.sort(key=lambda pair: (pair[0].file, pair[0].start))
    blobs: dict[tuple[str, int], list[ReadItem]] = {}
    for item, request in found:
        if request.type == LoadItemType.TENSOR and item.kind != "tensor":
            blobs.setdefault((item.file, item.start), []).append(request)
    for item, request in found:
        require(item)
        if request.type == LoadItemType.BYTE_IO:
            if item.kind == "tensor" or (item.kind in ("zstd", "stream") and item.shape is not None):
                raise CheckpointError(f"{item.name!r} is a tensor in the checkpoint; load it into a tensor")
            yield BytesLoad(item, request, planner, allow_pickle=allow_pickle, registry=registry)
        elif item.kind == "tensor":
            yield RowsLoad(item, request, planner)
        elif blob := blobs.pop((item.file, item.start), None):
            yield BlobLoad(item, blob, planner, registry=registry)


def run_loads(loads: Iterable[Load], source: Source, *, extra_memory_bytes: int = EXTRA_MEMORY_BYTES) -> None:
    """Fetches and finishes all loads, several reads at a time; loads are taken one by one, as their turn comes.

    Those under way take at most `extra_memory_bytes` beside their targets, or one more that is large.
    """
    most_held = max(extra_memory_bytes - READ_BYTES, 0)  # before the next group is made
    held = 0
    under_way: deque[tuple[list[Load], list[Future[None]]]] = deque()
    with Threads(_READERS, name="torchcache-load") as threads:
        try:
            for group, reads in _calmly(batches(loads)):
                under_way.append((group, [threads.submit(source.fetch, read) for read in reads]))
                held += _held(group)
                del group, reads
                while under_way and (len(under_way) >= _BATCHES_UNDER_WAY or held > most_held):
                    held -= _held(under_way[0][0])
                    _finish(*under_way.popleft())
            while under_way:
                _finish(*under_way.popleft())
        finally:
            for _, futures in under_way:
                for future in futures:
                    future.cancel()


def _calmly(batches: Iterator[_T]) -> Iterator[_T]:
    """The same, each made while the garbage collector waits."""
    while True:
        with garbage_waits():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
        del batch  # with all its memory, before the next is made


def _held(loads: Sequence[Load]) -> int:
    return sum(load.extra_bytes for load in loads)


def _finish(loads: list[Load], futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()
    for load in loads:
        load.finish()


def batches(loads: Iterable[Load]) -> Iterator[tuple[list[Load], list[list[Fetch]]]]:
    """Loads in groups of about READ_BYTES, each with its fetches as reads of at most READ_BYTES.

    What they take beside their targets counts as what they fetch. A group that is full comes before the next load is
    made, which takes memory.
    """
    group: list[Load] = []
    filled = extra = 0
    for load in loads:
        size, more = load.fetched_bytes, load.extra_bytes
        if group and max(filled + size, extra + more) > READ_BYTES:
            yield group, _reads(group)
            group, filled, extra = [], 0, 0
        group.append(load)
        del load  # whoever has the group forgets it, and its memory, before the next is made
        filled += size
        extra += more
        if max(filled, extra) >= READ_BYTES or len(group) >= _EXTENTS_A_READ:
            yield group, _reads(group)
            group, filled, extra = [], 0, 0
    if group:
        yield group, _reads(group)


def _reads(loads: Sequence[Load]) -> list[list[Fetch]]:
    reads: list[list[Fetch]] = []
    room = 0
    for fetch in (fetch for load in loads for fetch in load.fetches):
        for piece in _pieces(fetch):
            size = piece.part.length
            if size > room or len(reads[-1]) >= _EXTENTS_A_READ:
                reads.append([])
                room = READ_BYTES
            reads[-1].append(piece)
            room -= size
    return reads


def _pieces(fetch: Fetch) -> Sequence[Fetch]:
    """The same in pieces of at most READ_BYTES: itself, most often."""
    part = fetch.part
    if part.length <= READ_BYTES - GRANULE_BYTES:
        return (fetch,)
    return [
        Fetch(fetch.item, piece, fetch.into[piece.start - part.start : piece.end - part.start])
        for piece in cut(part, READ_BYTES)
    ]


def _item_of(items: Mapping[MetadataIndex, Item], request: ReadItem) -> Item:
    try:
        return items[request.storage_index]
    except KeyError:
        raise CheckpointError(
            f"the checkpoint's list of stored items has no {request.storage_index.fqn!r} at offset "
            f"{request.storage_index.offset}"
        ) from None


def _blob_bytes(item: Item) -> int:
    """What a blob takes, and what is made of it."""
    if item.kind in ("zstd", "stream") and item.dtype is not None and item.shape is not None:
        return item.payload_length + 2 * math.prod(item.shape) * dtype_of(item.dtype).itemsize
    return 2 * item.payload_length


def _whole(item: Item, blob: bytearray) -> list[Fetch]:
    return [Fetch(item, ByteRange(0, len(blob)), memoryview(blob))] if blob else []


def _unpacked(blob: bytearray, item: Item, registry: ExtensionRegistry | None) -> bytes | bytearray:
    """The torch.save blob of an item. Raises IntegrityError."""
    if item.kind not in ("zstd", "stream"):
        return blob
    size = None
    if item.dtype is not None and item.shape is not None:
        size = math.prod(item.shape) * dtype_of(item.dtype).itemsize
    if item.kind == "stream":
        return undo(blob, item.transforms, registry, tensor_bytes=size, name=item.name)
    return decompress(blob, tensor_bytes=size, name=item.name)


def _check_size(target: torch.Tensor, request: ReadItem) -> None:
    if target.size() != torch.Size(request.lengths):
        raise CheckpointError(
            f"{request.dest_index.fqn!r}: the plan reads {tuple(request.lengths)} into a tensor of "
            f"{tuple(target.size())}"
        )


def _load_safely(blob: bytes | bytearray, item: Item, *, map_location: str | None) -> Any:
    try:
        return torch.load(io.BytesIO(blob), map_location=map_location, weights_only=True)
    except Exception as error:
        unsafe = _unsafe_globals(blob)
        if not unsafe:
            raise CheckpointError(
                f"{item.name!r} can't be loaded with weights_only=True: {error}. If the checkpoint is yours and you "
                "trust it, CacheStorageReader(..., allow_pickle=True) loads it without that check"
            ) from error
        raise CheckpointError(
            f"{item.name!r} refers to {', '.join(unsafe)}, which torch's weights_only loading does not allow: refused, "
            "and not executed. If you trust it, allow these with torch.serialization.add_safe_globals([...]), or "
            "everything with CacheStorageReader(..., allow_pickle=True)"
        ) from error


def _unsafe_globals(blob: bytes | bytearray) -> list[str]:
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(blob)))
    except Exception:  # noqa: BLE001 - it only adds names to an error
        return []
