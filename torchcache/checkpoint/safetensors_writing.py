"""From a checkpoint's manifest to safetensors files: which tensor lies where, made of which stored blocks. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torchcache.checkpoint.manifest import Item, Manifest, Tensor
from torchcache.checkpoint.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES
from torchcache.errors import ConfigurationError, IntegrityError

CODES: Final = {
    "bool": "BOOL",
    "float4_e2m1fn_x2": "F4",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""The format's name of each of torch's dtypes that it knows."""

_HEADER_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A stored block of a tensor. `is_whole`: it is all of it."""

    item: Item
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file: `size` bytes from `start` on."""

    name: str
    code: str
    shape: tuple[int, ...]
    item_bytes: int
    start: int
    size: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file: its head (length and header), and what lies behind it."""

    name: str
    head: bytes
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(place.size for place in self.places)


def plan_files(manifest: Manifest, *, prefix: str, max_file_bytes: int) -> list[FilePlan]:
    """The files that hold all tensors whose names start with `prefix`, under their names without it.

    Widest elements first, so that all lie aligned, then by name. Raises ConfigurationError for a tensor without a form
    in safetensors, IntegrityError if the stored blocks don't make up a tensor.
    """
    blocks: dict[str, list[Item]] = {}
    for item in manifest.items:
        blocks.setdefault(item.name, []).append(item)
    tensors = [
        _place(name, name.removeprefix(prefix), tensor, blocks.get(name, []))
        for name, tensor in manifest.tensors.items()
        if name.startswith(prefix)
    ]
    tensors.sort(key=lambda place: (-place.item_bytes, place.name))
    groups = list(_groups(tensors, max_file_bytes))
    count = len(groups)
    return [
        _file("model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _place(stored: str, name: str, tensor: Tensor, items: Sequence[Item]) -> Place:
    code = CODES.get(tensor.dtype)
    if code is None or any(item.kind not in ("tensor", "zstd") for item in items):
        what = (
            f"of dtype {tensor.dtype}"
            if code is None
            else "no plain tensor (sparse, quantised, a subclass, saved through extensions)"
        )
        raise ConfigurationError(
            f"{stored!r} is {what}, which safetensors has no form for: leave it out with a prefix",
            object=stored,
        )
    item_bytes = max(1, DTYPE_BITS[code] // 8)
    whole = tuple(tensor.size)
    size = math.prod(whole) * item_bytes
    found = []
    for item in items:
        offsets, lengths = item.offset or (0,) * len(whole), item.shape or ()
        fits = len(offsets) == len(lengths) == len(whole) and all(
            offset + length <= limit for offset, length, limit in zip(offsets, lengths, whole, strict=True)
        )
        of_size = item.kind == "zstd" or math.prod(lengths) * item_bytes == item.payload_length
        if not fits or not of_size:
            raise IntegrityError(f"a stored block of {stored!r} lies outside of it")
        found.append(Block(item, offsets, lengths, lengths == whole))
    # Blocks of a checkpoint don't overlap: as many bytes as the tensor has are all of it.
    if sum(math.prod(block.lengths) * item_bytes for block in found) != size:
        raise IntegrityError(f"the stored blocks of {stored!r} don't make it up")
    return Place(name, code, whole, item_bytes, 0, size, tuple(found))


def _groups(tensors: Iterable[Place], max_file_bytes: int) -> Iterator[list[Place]]:
    group: list[Place] = []
    filled = 0
    for place in tensors:
        if group and filled + place.size > max_file_bytes:
            yield group
            group, filled = [], 0
        group.append(place)
        filled += place.size
    if group:
        yield group


def _file(name: str, group: Sequence[Place]) -> FilePlan:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for place in group:
        # Two F4 elements share a byte, and the format counts elements.
        shape = [*place.shape[:-1], 2 * place.shape[-1]] if place.code == "F4" else list(place.shape)
        described[place.name] = {"dtype": place.code, "shape": shape, "data_offsets": [end, end + place.size]}
        end += place.size
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _HEADER_ALIGNMENT)
    if len(header) > MAX_HEADER_BYTES:
        raise ConfigurationError("too many tensors for one file: give a smaller --max-file-size")
    head = len(header).to_bytes(8, "little") + header
    places, at = [], len(head)
    for place in group:
        places.append(
            Place(place.name, place.code, place.shape, place.item_bytes, at, place.size, place.blocks)
        )
        at += place.size
    return FilePlan(name, head, tuple(places))


def index_of(files: Sequence[FilePlan]) -> bytes:
    """The index beside several files."""
    total_bytes = sum(place.size for plan in files for place in plan.places)
    weight_map = {place.name: plan.name for plan in files for place in plan.places}
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
