"""The header of a safetensors file, and the index of a checkpoint in several: read without trusting them. Pure.

    file   = u64 little-endian: length of the header; the header, JSON; the data, every byte of it some tensor's
    header = {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]}, ..., "__metadata__": {text: text}}
    index  = {"metadata": {...}, "weight_map": {name: file beside the index, ...}}

What the reference (huggingface/safetensors, `SafeTensors::deserialize`) refuses is refused here, and a name given twice
besides. No memory is set aside by what a header claims before the claim is checked against the file's real size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from torchcache.checkpoint.columns import require
from torchcache.checkpoint.manifest import checked_name
from torchcache.errors import IntegrityError
from torchcache.model import ByteRange

LENGTH_BYTES: Final = 8
"""Of the number that a file begins with."""

MAX_HEADER_BYTES: Final = 100_000_000
"""The reference's limit."""

MAX_TENSORS: Final = 200_000
"""In one file, or in one index: twice what the largest models have in all their files."""

MAX_INDEX_BYTES: Final = 64 * 1024 * 1024

DTYPE_BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits an element of each dtype that the format knows, as of safetensors 0.8."""

_MAX_COUNT: Final = 1 << 62
_MAX_DIMENSIONS: Final = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its dtype as the format calls it, its shape in elements, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: ByteRange


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file, ordered by where they lie, and its metadata (None where it has none)."""

    tensors: dict[str, Entry]
    metadata: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Index:
    """Which file each tensor lies in, by name; and the index's own metadata."""

    files: dict[str, str]
    metadata: dict[str, Any]


def header_end(start: bytes | memoryview, size: int, *, where: str) -> int:
    """First byte behind the header of a file of `size` bytes, of which `start` are the first 8 or more.

    Raises IntegrityError, naming `where`, for a length that can't be.
    """
    with _refusing(where, "safetensors file"):
        require(size >= LENGTH_BYTES and len(start) >= LENGTH_BYTES, f"it has only {size} bytes")
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        require(length <= MAX_HEADER_BYTES, f"it claims a header of {length} bytes")
        require(
            LENGTH_BYTES + length <= size, f"its header should have {length} bytes, the whole file has {size}"
        )
        return LENGTH_BYTES + length


def parse_header(data: bytes, size: int, *, where: str) -> Header:
    """The header whose JSON is `data`, of a file of `size` bytes.

    Raises IntegrityError, naming `where`, unless the tensors fill the rest of the file without gap or overlap, each
    with just the bytes that its dtype and shape take.
    """
    with _refusing(where, "safetensors file"):
        # Before it costs ten seconds and half a GB. Spelt with escapes they still stay within the limit of bytes.
        require(data.count(b'"data_offsets"') <= MAX_TENSORS, f"it holds more than {MAX_TENSORS} tensors")
        found = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        require(type(found) is dict, "its header is no JSON object")
        metadata = found.pop("__metadata__", None)
        require(metadata is None or _is_texts(metadata), "its __metadata__ holds something else than texts")
        tensors = _placed(found, LENGTH_BYTES + len(data), size)
        return Header(tensors, metadata)


def parse_index(data: bytes, *, where: str) -> Index:
    """The index whose JSON is `data`. Raises IntegrityError if it is damaged, or names a file outside its folder."""
    with _refusing(where, "index of safetensors files"):
        found = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        files = found["weight_map"]
        metadata = found.get("metadata") or {}
        require(
            type(files) is dict and type(metadata) is dict, "its weight_map or metadata is no JSON object"
        )
        require(len(files) <= MAX_TENSORS, f"it holds more than {MAX_TENSORS} tensors")
        checked: set[str] = set()
        for name, file in files.items():
            if file not in checked:
                checked.add(_checked_file(file))
            name.encode()
        return Index(files, metadata)


class _refusing:  # noqa: N801 - reads as the statement it is
    """Turns whatever parsing meets into one IntegrityError."""

    def __init__(self, where: str, what: str) -> None:
        self._where = where
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ValueError | KeyError | TypeError | RecursionError | AttributeError):
            raise IntegrityError(
                f"{self._where} is no sound {self._what}: {_short(error)}; get it again from where it came from",
                object=self._where,
            ) from None


def _short(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    return f"{error}"[:300] if not isinstance(error, KeyError) else f"it has no {error}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} stands there twice")
    return found


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A tensor's description as a small tuple, at once: a million of them as dicts would fill the memory."""
    found = _unique(pairs)
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if type(dtype) is str and type(shape) is list and type(offsets) is list:
        return dtype, _counts(shape), _counts(offsets)
    return found


def _counts(values: Sequence[object]) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_COUNT:
            raise ValueError(f"{value!r:.100} stands where a count should")
    return cast(tuple[int, ...], tuple(values))


def _is_texts(value: object) -> bool:
    return type(value) is dict and all(type(text) is str for text in cast(dict[str, Any], value).values())


def _placed(found: dict[str, Any], data_start: int, size: int) -> dict[str, Entry]:
    for name, described in found.items():
        if type(described) is not tuple or len(described[2]) != 2:
            raise ValueError(f"{name[:100]!r} is not described as a tensor")
        name.encode()  # half a surrogate pair is no name
    tensors: dict[str, Entry] = {}
    end = data_start
    for name in sorted(found, key=lambda name: cast(tuple[int, int], found[name][2])):
        dtype, shape, (start, stop) = found[name]
        problem = ""
        if data_start + start != end:
            problem = "overlaps another, or leaves a gap before it"
        elif start > stop:
            problem = "ends before it starts"
        elif data_start + stop > size:
            problem = "reaches beyond the end of the file"
        elif _size_bytes(dtype, shape, name) != stop - start:
            problem = f"has {stop - start} bytes, not what {dtype[:20]} of shape {str(shape)[:100]} takes"
        if problem:
            raise ValueError(f"{name[:100]!r} {problem}")
        end = data_start + stop
        tensors[name] = Entry(dtype, shape, ByteRange(data_start + start, end))
    if end != size:
        raise ValueError(f"{size - end} bytes at its end belong to no tensor")
    return tensors


def _size_bytes(dtype: str, shape: tuple[int, ...], name: str) -> int:
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{name[:100]!r} is of dtype {dtype[:20]!r}, which the format does not know")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name[:100]!r} has {len(shape)} dimensions")
    for count in shape:
        bits *= count
        if bits >= 8 * _MAX_COUNT:
            raise ValueError(f"{name[:100]!r} is larger than anything")
    if bits % 8:
        raise ValueError(f"{name[:100]!r} ends within a byte")
    return bits // 8


def _checked_file(file: object) -> str:
    name = checked_name(file)
    name.encode()
    require(
        name.endswith(".safetensors") and "\\" not in name and ":" not in name and len(name) <= 1024,
        f"{name[:100]!r} is no safetensors file beside the index",
    )
    return name
