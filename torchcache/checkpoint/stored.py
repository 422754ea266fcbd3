"""What lies behind the names in a checkpoint's metadata: items, and whether they are as large as what it claims."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from torchcache.checkpoint.compression import DESCRIPTOR
from torchcache.checkpoint.extensions import extensions_of
from torchcache.checkpoint.manifest import Item, Kind
from torchcache.checkpoint.metadata import StorageInfo, dtype_name
from torchcache.checkpoint.source import Source
from torchcache.errors import CheckpointError, IntegrityError

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import ExtensionRegistry

_MOST_RATIO: Final = 1 << 15
"""A zstd block of 128 KiB that holds one value takes four bytes."""
_ZSTD: Final = DESCRIPTOR.partition("/")[0]


class Backing:
    """Whether tensors are stored as large as a checkpoint's `metadata` says: asked before memory is made for them.

    What extensions of `registry` make of an item nobody can tell before it is read: those that the user brings are
    trusted with it.
    """

    def __init__(
        self, metadata: Metadata, source: Source, *, where: str, registry: ExtensionRegistry | None = None
    ) -> None:
        self.metadata = metadata
        self._source = source
        self._where = where
        self._registry = registry

    def require(self, names: Collection[str]) -> None:
        """Raises IntegrityError for a tensor of which the files, as large as they really are, can't hold all, and
        CheckpointError for one that went through extensions which the registry doesn't have."""
        most: dict[str, float] = dict.fromkeys(names, 0)
        for index, info in (self.metadata.storage_data or {}).items() if most else ():
            if index.fqn in most:
                item = item_at(index, info, self.metadata)
                self._source.require(item)
                most[index.fqn] += self._most_bytes(item)
        for name, held in most.items():
            entry = self.metadata.state_dict_metadata[name]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            claimed = math.prod(entry.size) * entry.properties.dtype.itemsize
            if claimed > held or min(entry.size, default=0) < 0:
                raise IntegrityError(
                    f"{name!r} of {self._where} is said to be a tensor of {tuple(entry.size)}, {claimed:,} bytes, and "
                    f"what is stored of it can be {held:,} at most: refused before memory is made for it. Load an "
                    "older checkpoint",
                    object=self._where,
                )

    def _most_bytes(self, item: Item) -> float:
        """What the stored bytes of an item can become at most."""
        if item.kind not in ("zstd", "stream"):
            return item.length
        if all(transform.partition("/")[0] == _ZSTD for transform in item.transforms):
            return item.length * _MOST_RATIO
        extensions_of(item.transforms, self._registry, name=item.name)
        return math.inf


def item_at(index: MetadataIndex, info: object, metadata: Metadata) -> Item:
    """Items as they are; torch's own record of one as an Item whose payload is the whole blob, without checksums."""
    if isinstance(info, Item):
        return info
    if not isinstance(info, StorageInfo):
        raise CheckpointError(f"{index.fqn!r} was stored by another kind of writer: {type(info).__name__}")
    transforms = tuple(getattr(info, "transform_descriptors", None) or ())
    kind: Kind = "opaque" if not transforms else "zstd" if transforms == (DESCRIPTOR,) else "stream"
    dtype, shape = _block(index, metadata) if transforms else (None, None)
    return Item(
        name=index.fqn,
        offset=None if index.offset is None else tuple(index.offset),
        index=index.index,
        kind=kind,
        dtype=dtype,
        shape=shape,
        file=info.relative_path,
        start=info.offset,
        length=info.length,
        payload_start=0,
        payload_length=info.length,
        frame_digest=0,
        digests=(),
        transforms=transforms if kind == "stream" else (),
    )


def _block(index: MetadataIndex, metadata: Metadata) -> tuple[str | None, tuple[int, ...] | None]:
    """Dtype and shape of the block of a tensor that an index means; None of another object."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not isinstance(entry, TensorStorageMetadata):
        return None, None
    offset = None if index.offset is None else tuple(index.offset)
    for chunk in entry.chunks:
        if offset in (None, tuple(chunk.offsets)):
            return dtype_name(entry.properties.dtype), tuple(chunk.sizes)
    return None, None
