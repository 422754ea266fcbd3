"""From what a planner resolves to the buffers of one file: frames, tensors' own memory, and padding."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from torchcache.checkpoint import manifest
from torchcache.checkpoint.compression import DESCRIPTOR, LEAST_BYTES, Zstd, decompressed_limit
from torchcache.checkpoint.extensions import descriptors_of, transform
from torchcache.checkpoint.frame import blob_of, bytes_of, frame, has_row_major_bytes, row_major
from torchcache.checkpoint.garbage import garbage_waits
from torchcache.checkpoint.host_memory import Room, copied_bytes, to_host
from torchcache.checkpoint.layout import MOST_FILE_BYTES, align
from torchcache.checkpoint.manifest import Item, frame_digest, payload_digests, probe_digest, probe_ranges
from torchcache.checkpoint.metadata import dtype_name
from torchcache.checkpoint.passing import PassingDigests
from torchcache.checkpoint.reuse import LEAST_COMPARED_BYTES
from torchcache.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import StreamTransformExtension

_GUESSED_OBJECT_BYTES = 4096
_HASHED_AS_SENT_BYTES = 1024 * 1024
"""Of smaller payloads a pass of their own costs less than to look which of them a piece belongs to."""


def expected_bytes(item: WriteItem) -> int:
    """About how many bytes an item will take, before it is resolved."""
    if item.tensor_data is None:
        return item.bytes_io_data.nbytes if item.bytes_io_data else _GUESSED_OBJECT_BYTES
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Blob:
    """One item as bytes: head + payload + tail."""

    item: WriteItem
    kind: manifest.Kind
    dtype: str | None
    shape: tuple[int, ...] | None
    head: bytes
    payload: memoryview
    tail: bytes
    transforms: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.head) + len(self.payload) + len(self.tail)


def _blob(item: WriteItem, data: torch.Tensor | io.BytesIO) -> _Blob:
    name = item.index.fqn
    if item.type == WriteItemType.BYTE_IO:
        if not isinstance(data, io.BytesIO):
            raise CheckpointError(
                f"the planner resolved {name!r} to a {type(data).__name__}, not to a BytesIO"
            )
        return _Blob(item, "bytes", None, None, b"", data.getbuffer(), b"")
    if not isinstance(data, torch.Tensor):
        raise CheckpointError(f"the planner resolved {name!r} to a {type(data).__name__}, not to a tensor")
    tensor = row_major(data, name=name) if has_row_major_bytes(data) else None
    around = frame(tensor.dtype, tuple(tensor.shape)) if tensor is not None else None
    if tensor is None or around is None:
        return _Blob(item, "opaque", dtype_name(data.dtype), tuple(data.shape), b"", blob_of(data), b"")
    return _Blob(
        item,
        "tensor",
        dtype_name(tensor.dtype),
        tuple(tensor.shape),
        around.head,
        bytes_of(tensor),
        around.tail,
    )


def _on_host(data: Sequence[torch.Tensor | io.BytesIO]) -> Iterator[torch.Tensor | io.BytesIO]:
    """The same, with tensors of a GPU in the memory of the host."""
    tensors = iter(to_host([one for one in data if isinstance(one, torch.Tensor)]))
    for one in data:
        yield next(tensors) if isinstance(one, torch.Tensor) else one


def _compressed(blob: _Blob, how: Zstd) -> _Blob:
    """The blob within a frame, or itself: a blob that torch made anew tells nobody how large it was."""
    if blob.kind == "opaque" or len(blob.payload) < LEAST_BYTES:
        return blob
    frame = how.compress([blob.head, blob.payload, blob.tail])
    if frame is None or blob.length > _most_undone(blob, len(frame)):
        return blob
    return _Blob(blob.item, "zstd", blob.dtype, blob.shape, b"", memoryview(frame), b"")


def _most_undone(blob: _Blob, size: int) -> int:
    """The most that readers let `size` bytes become which are stored for the blob: beyond it they refuse a bomb."""
    return decompressed_limit(size, tensor_bytes=len(blob.payload) if blob.kind == "tensor" else None)


def _transformed(blob: _Blob, extensions: Sequence[StreamTransformExtension]) -> _Blob:
    """The blob as stream extensions make it: every one, as stock's writer does it.

    Raises CheckpointError for one that gets so small that readers would refuse it.
    """
    stream = transform([blob.head, blob.payload, blob.tail], extensions)
    transforms = descriptors_of(extensions)
    if blob.length > _most_undone(blob, len(stream)):
        raise CheckpointError(
            f"{blob.item.index.fqn!r}, an object of {blob.length:,} bytes, becomes {len(stream):,} by "
            f"{', '.join(transforms)}: readers refuse what unpacks to so much more than is stored. Save it as an "
            "ordinary tensor or as several objects, or without _extensions: compression='zstd' stores it as it is"
        )
    kind: manifest.Kind = "zstd" if transforms == (DESCRIPTOR,) else "stream"
    # A blob that torch made anew tells nobody how large it was.
    dtype, shape = (None, None) if blob.kind == "opaque" else (blob.dtype, blob.shape)
    return _Blob(blob.item, kind, dtype, shape, b"", stream, b"", transforms if kind == "stream" else ())


def _probe(blob: _Blob) -> int:
    if blob.kind != "tensor" or len(blob.payload) < LEAST_COMPARED_BYTES:
        return 0
    return probe_digest(blob.payload[part.start : part.end] for part in probe_ranges(len(blob.payload)))


def _object_bytes(data: torch.Tensor | io.BytesIO | None) -> int:
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else 0


def _is_large(blob: _Blob) -> bool:
    return len(blob.payload) > _HASHED_AS_SENT_BYTES


class StagedFile:
    """One file of a save. After `lay_out` it is ready: `buffers` are its bytes in order, `size` their sum.

    Whoever sends them tells `passing` of each piece first (see `lanes.base.Passing`), and then asks `describe`.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[WriteItem],
        resolve: Callable[[WriteItem], torch.Tensor | io.BytesIO],
        *,
        compression: Zstd | None = None,
        extensions: Sequence[StreamTransformExtension] = (),
        room: Room | None = None,
        most_object_bytes: int = MOST_FILE_BYTES,
    ) -> None:
        """Resolves `items`, and copies only what isn't contiguous in CPU memory.

        For that, for other objects than tensors, and for what is compressed or goes through `extensions`, it waits
        until `room` has the bytes. `close` gives them back. How large objects are is known once they are resolved:
        behind `most_object_bytes` of them the file ends, and `rest` are the items that have no place in it.
        """
        self.name = name
        self.buffers: list[bytes | memoryview] = []
        self.size = 0
        self.rest: Sequence[WriteItem] = ()
        self._compression = compression
        self._extensions = extensions
        self._room, self._taken = room, 0
        tensors = [None if item.type == WriteItemType.BYTE_IO else resolve(item) for item in items]
        # For all of it at once: files that each wait for more, and hold some, would wait for one another.
        objects_bytes = most_object_bytes * (1 + self._is_remade) if None in tensors else 0
        self._take(sum(map(self._extra_bytes, tensors)) + objects_bytes)
        try:
            data: list[torch.Tensor | io.BytesIO] = []
            object_bytes = 0
            for item, tensor in zip(items, tensors, strict=True):
                if tensor is None and object_bytes >= most_object_bytes and data:
                    items, self.rest = items[: len(data)], items[len(data) :]
                    break
                data.append(resolve(item) if tensor is None else tensor)
                object_bytes += _object_bytes(data[-1])
            del tensors
            self._correct(sum(map(self._extra_bytes, data)))
            with garbage_waits():
                self._resolved = [_blob(item, one) for item, one in zip(items, _on_host(data), strict=True)]
        except BaseException:
            self.close()
            raise
        self._blobs: list[tuple[int, _Blob, tuple[int, ...]]] = []
        self.passing = PassingDigests([])

    def _take(self, bytes: int) -> None:
        if self._room is not None:
            self._room.take(bytes)
            self._taken = bytes

    def _correct(self, bytes: int) -> None:
        if self._room is not None:
            self._room.correct(self._taken, bytes)
            self._taken = bytes

    @property
    def _is_remade(self) -> bool:
        """Whether there is a second of everything: as it was, and as it is stored."""
        return self._compression is not None or bool(self._extensions)

    def _extra_bytes(self, data: torch.Tensor | io.BytesIO | None) -> int:
        if not isinstance(data, torch.Tensor):
            return _object_bytes(data) * (1 + self._is_remade)
        return copied_bytes(data) + (data.numel() * data.dtype.itemsize if self._is_remade else 0)

    def close(self) -> None:
        """Its bytes aren't needed any more."""
        self.buffers, self._resolved, self._blobs = [], [], []
        self.passing = PassingDigests([])
        if self._room is not None:
            self._room.give_back(self._taken)
            self._taken = 0

    def lay_out(self) -> None:
        """Compresses what is to be compressed, gives each item its place, and hashes small ones. In any thread."""
        waiting, self._resolved = self._resolved[::-1], []
        while waiting:
            self._append(self._remade(waiting.pop()))
        large = [(start + len(blob.head), blob.payload) for start, blob, _ in self._blobs if _is_large(blob)]
        self.passing = PassingDigests(large)

    def _remade(self, blob: _Blob) -> _Blob:
        if self._extensions:
            return _transformed(blob, self._extensions)
        return blob if self._compression is None else _compressed(blob, self._compression)

    def _append(self, blob: _Blob) -> None:
        start = align(self.size)
        pieces: list[bytes | memoryview] = [bytes(start - self.size), blob.head, blob.payload, blob.tail]
        self.buffers += [piece for piece in pieces if len(piece)]
        self._blobs.append((start, blob, () if _is_large(blob) else payload_digests(blob.payload)))
        self.size = start + blob.length

    def describe(self) -> list[tuple[WriteItem, Item]]:
        """What the manifest says of each item: asked once the file is sent, as checksums are taken by then."""
        return [(blob.item, self._item(start, blob, digests)) for start, blob, digests in self._blobs]

    def _item(self, start: int, blob: _Blob, digests: tuple[int, ...]) -> Item:
        index = blob.item.index
        return Item(
            name=index.fqn,
            offset=None if index.offset is None else tuple(index.offset),
            index=index.index,
            kind=blob.kind,
            dtype=blob.dtype,
            shape=blob.shape,
            file=self.name,
            start=start,
            length=blob.length,
            payload_start=len(blob.head),
            payload_length=len(blob.payload),
            frame_digest=frame_digest(blob.head, blob.tail),
            digests=self.passing.of(start + len(blob.head)) if _is_large(blob) else digests,
            probe=_probe(blob),
            transforms=blob.transforms,
        )
