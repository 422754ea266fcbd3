"""The typed encoding of computed samples: what `dataset[i]` returned, as bytes and back, without pickle.

A record is::

    header    magic "TCS1", kind (u8), 3 zero bytes, length of the tree (u64), length of the record (u64)
    tree      one node: a tag byte and what belongs to it; see tree.py
    leaves    the bytes of the tree's tensors and arrays in its order, each at a multiple of 64 bytes

All numbers are little-endian. Nothing in a record says where a leaf lies: places follow from the order, sizes from
dtype and shape, so no record can point outside itself or twice at one place. Of kind "custom", the tree is empty and
the one leaf is what the user's `encode=` returned.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from torchcache.data.leaves import Leaf, LeafReader, align
from torchcache.data.tree_reader import TreeReader
from torchcache.data.tree_writer import TreeWriter
from torchcache.errors import ConfigurationError, IntegrityError

_MAGIC = b"TCS1"
_HEADER = struct.Struct("<4sB3xQQ")
_TYPED, _CUSTOM = 0, 1
_MODES = {_TYPED: "without encode=", _CUSTOM: "with encode="}


def encode(sample: object) -> memoryview:
    """`sample` as one record, in a new writable buffer aligned to 64 bytes.

    Raises UnsupportedSample (a TypeError) that names the path of what has no form.
    """
    writer = TreeWriter()
    writer.put(sample)
    return _assemble(_TYPED, writer.tree, writer.leaves)


def decode(record: bytes | bytearray | memoryview) -> object:
    """The sample of a record of `encode`.

    Tensors and arrays are views of `record` if that is writable and aligned to 64 bytes, which means that the caller
    owns it; else copies. Either way they are writable and share no memory with a read-only `record`.

    Raises IntegrityError if the record is not whole and well formed, whatever its bytes are, and ConfigurationError if
    it was stored with `encode=` or names a class that is not to be had here.
    """
    memory, tree, leaves = _open(record, _TYPED)
    try:
        reader = TreeReader(tree, LeafReader(memory, leaves))
        sample = reader.take()
        reader.finish()
    except (IntegrityError, ConfigurationError):
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, SystemError, struct.error) as error:
        # numpy and torch refuse, each with errors of its own, what a damaged record makes them build.
        raise IntegrityError(f"a stored sample is malformed: {error}") from error
    return sample


def encode_custom(data: bytes | bytearray | memoryview) -> memoryview:
    """What the user's `encode=` returned, as a record."""
    try:
        source = (
            np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8) if len(data) else np.empty(0, np.uint8)
        )
    except (TypeError, ValueError, BufferError) as error:
        raise ConfigurationError(
            f"encode= must return bytes or another contiguous buffer, not {type(data).__qualname__}"
        ) from error
    return _assemble(_CUSTOM, b"", [Leaf(source.nbytes, lambda target: np.copyto(target.numpy(), source))])


def decode_custom(record: bytes | bytearray | memoryview) -> memoryview:
    """The read-only bytes that `encode=` returned. Raises as `decode` does."""
    memory, tree, leaves = _open(record, _CUSTOM)
    if tree.nbytes:
        raise IntegrityError("a stored sample has a tree where none belongs")
    return memory[leaves:].toreadonly()


def _assemble(kind: int, tree: bytes | bytearray, leaves: Sequence[Leaf]) -> memoryview:
    starts, end = [], _HEADER.size + len(tree)
    for leaf in leaves:
        starts.append(align(end))
        end = starts[-1] + leaf.size_bytes
    buffer = torch.empty(end, dtype=torch.uint8)  # torch aligns to 64 bytes, numpy and bytearray don't
    array = buffer.numpy()
    _HEADER.pack_into(array.data, 0, _MAGIC, kind, len(tree), end)
    array[_HEADER.size : _HEADER.size + len(tree)] = np.frombuffer(tree, np.uint8) if tree else ()
    gap = _HEADER.size + len(tree)
    for start, leaf in zip(starts, leaves, strict=True):
        array[gap:start] = 0
        gap = start + leaf.size_bytes
        if leaf.size_bytes:
            leaf.copy_to(buffer[start:gap])
    return array.data


def _open(record: bytes | bytearray | memoryview, kind: int) -> tuple[memoryview, memoryview, int]:
    """The record as bytes, its tree, and where its first leaf lies."""
    memory = memoryview(record).cast("B")
    if len(memory) < _HEADER.size:
        raise IntegrityError(f"a stored sample has {len(memory)} bytes, less than its header")
    magic, found, tree_bytes, total_bytes = _HEADER.unpack_from(memory)
    if magic != _MAGIC or found not in _MODES:
        raise IntegrityError("a stored sample is of an unknown format")
    if total_bytes != len(memory) or tree_bytes > total_bytes - _HEADER.size:
        raise IntegrityError(f"a stored sample of {total_bytes} bytes came as {len(memory)} bytes")
    if found != kind:
        raise ConfigurationError(
            f"this dataset's samples were stored {_MODES[found]}, and are read {_MODES[kind]}: "
            "give the dataset another name= or version="
        )
    end = _HEADER.size + tree_bytes
    leaves = min(align(end), total_bytes) if kind == _CUSTOM else end
    return memory, memory[_HEADER.size : end], leaves
