"""Our manifest: JSON that says what a save holds, where its bytes lie and what their checksums are. Free of torch.

It lies beside torch's `.metadata` as `.torchcache.json` and is written last: whoever finds it finds a whole
checkpoint. It carries all that `.metadata` does, so that loading needs no pickle, and a SHA-256 of itself.

    {"format": "torchcache-checkpoint", "version": 1, "sha256": "...", "body": {
      "save_id": ..., "checkpoint": URI, "created_unix_s": ..., "torch": version, "torchcache": version,
      "dcp_version": Metadata.version, "planner_data": see `encode_plain`, "pickled_bytes": int,
      "files": [[name, bytes], ...],
      "objects": [fully qualified name, ...],
      "tensors": {name: [dtype, requires_grad, pin_memory, memory format, size, [[offsets, sizes], ...]]},
      "items": [[one value for each of ITEM_COLUMNS], ...]}}
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import xxhash

from torchcache.checkpoint.columns import as_tuples, counts, lists_of_counts, present, require, texts
from torchcache.checkpoint.columns import rows as columns_of
from torchcache.checkpoint.layout import GRANULE_BYTES, granules
from torchcache.errors import CheckpointError, IntegrityError
from torchcache.model import ByteRange
from torchcache.save_names import MOST_MANIFEST_BYTES

FORMAT = "torchcache-checkpoint"
VERSION = 1

ITEM_COLUMNS = (
    "name",  # fully qualified name in the state dict
    "offset",  # of a tensor's block within the whole tensor; null of other objects
    "index",  # number of the block in the tensor's list, or null
    "kind",  # "tensor", "opaque", "bytes" or "zstd": see Item; of "stream" the list of its transforms
    "dtype",  # of a tensor, without "torch."; else null
    "shape",  # of a tensor's block as stored; else null
    "file",  # number in "files"
    "start",  # first byte of the item in its file
    "length",  # bytes of the item
    "payload_start",  # first byte of the payload, in the item
    "payload_length",  # bytes of the payload
    "frame_digest",  # xxh3-64 (16 hex digits) of the item's bytes before and behind the payload, together
    "digests",  # xxh3-64 of each GRANULE_BYTES of the payload, one after the other
)

Kind = Literal["tensor", "opaque", "bytes", "zstd", "stream"]
_KINDS = {"tensor", "opaque", "bytes", "zstd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One stored item. All offsets and lengths are bytes.

    "tensor": a torch.save blob whose payload is the tensor's elements, row-major. "opaque": a torch.save blob of a
    tensor that has no such form (sparse, quantised, a subclass). "bytes": what the planner made of another object.
    "zstd": a zstd frame around a "tensor", which has dtype and shape then, or around "bytes". "stream": what stream
    extensions made of any of these, with dtype and shape as for "zstd"; `transforms` are their descriptors. The payload
    of the last four is the whole item.
    """

    name: str
    offset: tuple[int, ...] | None
    index: int | None
    kind: Kind
    dtype: str | None
    shape: tuple[int, ...] | None
    file: str
    start: int
    length: int
    payload_start: int
    payload_length: int
    frame_digest: int
    digests: tuple[int, ...]
    probe: int = field(
        default=0, compare=False
    )  # of the process that wrote it alone, see `probe_digest`; 0: unknown
    transforms: tuple[str, ...] = ()

    @property
    def payload(self) -> ByteRange:
        """The payload's bytes in the file."""
        return ByteRange(
            self.start + self.payload_start, self.start + self.payload_start + self.payload_length
        )

    def verify(self, part: ByteRange, data: memoryview) -> None:
        """Checks bytes `part` of the payload against each checksum whose granule they cover whole.

        Raises IntegrityError naming the item and its file.
        """
        for number in range(-(-part.start // GRANULE_BYTES), len(self.digests)):
            start = number * GRANULE_BYTES
            end = min(start + GRANULE_BYTES, self.payload_length)
            if end > part.end:
                break
            if xxhash.xxh3_64_intdigest(data[start - part.start : end - part.start]) != self.digests[number]:
                where = self.payload.start + start
                raise IntegrityError(
                    f"{self.name!r} in file {self.file} does not match the checksum in the checkpoint's manifest "
                    f"(bytes {where} to {where + end - start} of the file)"
                )


def _set_state(item: Item, state: Sequence[Any]) -> None:
    """One that a rank of an older version has pickled lacks the last fields, which have defaults."""
    known = fields(item)
    for one, value in zip(known, state, strict=False):
        object.__setattr__(item, one.name, value)
    for one in known[len(state) :]:
        object.__setattr__(item, one.name, one.default)


# Behind the class: until Python 3.11.4 `dataclass` puts a method of its own in the place of one that the class has.
Item.__setstate__ = _set_state  # type: ignore[attr-defined]


def payload_digests(payload: memoryview) -> tuple[int, ...]:
    """xxh3-64 of each granule of a payload."""
    starts = range(0, len(payload), GRANULE_BYTES)
    return tuple(xxhash.xxh3_64_intdigest(payload[at : at + GRANULE_BYTES]) for at in starts)


_PROBED_BYTES = 4096


def probe_ranges(length: int) -> list[ByteRange]:
    """What of a payload of `length` bytes is looked at first when it is compared: its ends and its middle."""
    if length <= 3 * _PROBED_BYTES:
        return [ByteRange(0, length)]
    middle = length // 2 // _PROBED_BYTES * _PROBED_BYTES
    last = (length - _PROBED_BYTES) // 64 * 64  # where an element starts, of any type
    return [ByteRange(at, at + _PROBED_BYTES) for at in (0, middle, last)]


def probe_digest(pieces: Iterable[memoryview]) -> int:
    """xxh3-64 of the pieces that `probe_ranges` names, one behind the other."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return int(state.intdigest())


def frame_digest(head: bytes | memoryview, tail: bytes | memoryview) -> int:
    """xxh3-64 of what lies around a payload."""
    state = xxhash.xxh3_64(head)
    state.update(tail)
    return int(state.intdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor as torch's TensorStorageMetadata has it: `blocks` are (offsets, sizes)."""

    dtype: str
    requires_grad: bool
    pin_memory: bool
    memory_format: str
    size: tuple[int, ...]
    blocks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one save holds.

    `planner_data` is encoded by `encode_plain`; where that can't be, it lies in `.metadata` only, whose size is then
    `pickled_bytes` (else 0). Names within the state dict keep their order.
    """

    save_id: str
    checkpoint: str
    created_unix_s: float
    torch: str
    torchcache: str
    dcp_version: str | None
    files: dict[str, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()
    planner_data: Any = None
    pickled_bytes: int = 0

    def encode(self) -> bytes:
        """As JSON, ASCII only. Raises CheckpointError if it would be larger than anybody reads."""
        numbers = {name: i for i, name in enumerate(self.files)}
        body = {
            "save_id": self.save_id,
            "checkpoint": self.checkpoint,
            "created_unix_s": self.created_unix_s,
            "torch": self.torch,
            "torchcache": self.torchcache,
            "dcp_version": self.dcp_version,
            "planner_data": self.planner_data,
            "pickled_bytes": self.pickled_bytes,
            "files": list(self.files.items()),
            "objects": self.objects,
            "tensors": {name: _tensor_row(tensor) for name, tensor in self.tensors.items()},
            "items": [_item_row(item, numbers) for item in self.items],
        }
        encoded = _canonical(body)
        whole = _head(hashlib.sha256(encoded).hexdigest()) + encoded + b"}"
        if len(whole) > MOST_MANIFEST_BYTES:
            raise CheckpointError(
                f"{self.checkpoint} has too many items, {len(self.items):,}: its manifest would have {len(whole):,} "
                f"bytes, and at most {MOST_MANIFEST_BYTES:,} are read. Save it in parts, under several paths",
                object=self.checkpoint,
            )
        return whole

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Manifest:
        """Reads and checks a manifest. Raises IntegrityError, naming `where`, if it is damaged or makes no sense."""
        try:
            require(
                len(data) <= MOST_MANIFEST_BYTES,
                f"it has {len(data):,} bytes, and at most {MOST_MANIFEST_BYTES:,} are read",
            )
            outer = json.loads(data)
            require(
                isinstance(outer, dict) and outer.get("format") == FORMAT, "it is no manifest of torchcache"
            )
            require(outer.get("version") == VERSION, f"its version {outer.get('version')!r} is unknown")
            body, digest = outer["body"], outer["sha256"]
            head = _head(digest)
            # As we write it the body needn't be made anew to be hashed; whoever wrote it otherwise loses nothing.
            encoded = memoryview(data)[len(head) : -1] if data.startswith(head) else _canonical(body)
            require(hashlib.sha256(encoded).hexdigest() == digest, "its checksum is wrong")
            return _manifest(body)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError) as error:
            raise IntegrityError(
                f"the manifest of the checkpoint {where} can't be used: {error}; load an older checkpoint",
                object=where,
            ) from error


def _head(digest: object) -> bytes:
    """What stands before the body."""
    outer = _canonical({"format": FORMAT, "version": VERSION, "sha256": digest, "body": None})
    return outer.removesuffix(b"null}")


def _canonical(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _tensor_row(tensor: Tensor) -> list[Any]:
    return [
        tensor.dtype,
        tensor.requires_grad,
        tensor.pin_memory,
        tensor.memory_format,
        tensor.size,
        tensor.blocks,
    ]


def _item_row(item: Item, numbers: dict[str, int]) -> list[Any]:
    return [
        item.name,
        item.offset,
        item.index,
        list(item.transforms) if item.kind == "stream" else item.kind,
        item.dtype,
        item.shape,
        numbers[item.file],
        item.start,
        item.length,
        item.payload_start,
        item.payload_length,
        f"{item.frame_digest:016x}",
        "".join(f"{digest:016x}" for digest in item.digests),
    ]


def _manifest(body: dict[str, Any]) -> Manifest:
    files: dict[str, int] = {}
    for name, size in body["files"]:
        files[checked_name(name)] = _count(size)
    require(len(files) == len(body["files"]), "a file is named twice")
    names = list(files)
    return Manifest(
        save_id=_text(body["save_id"]),
        checkpoint=_text(body["checkpoint"]),
        created_unix_s=float(body["created_unix_s"]),
        torch=_text(body["torch"]),
        torchcache=_text(body["torchcache"]),
        dcp_version=None if body["dcp_version"] is None else _text(body["dcp_version"]),
        files=files,
        tensors=_tensors(body["tensors"]),
        objects=tuple(map(_text, body["objects"])),
        items=tuple(_items(body["items"], names, files)),
        planner_data=body["planner_data"],
        pickled_bytes=_count(body["pickled_bytes"]),
    )


def checked_name(name: object) -> str:
    """A file's name relative to its checkpoint. Raises ValueError for one that would lead elsewhere."""
    text = _text(name)
    parts = text.split("/")
    require(
        not any(part in {"", ".", ".."} for part in parts) and "\0" not in text, f"bad file name {name!r}"
    )
    return text


def _tensors(rows: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name. Raises ValueError, as all of these."""
    names = texts(list(rows))
    columns = columns_of(list(rows.values()), 6)
    dtypes, formats = texts(columns[0]), texts(columns[3])
    sizes, blocks = lists_of_counts(columns[4]), columns[5]
    for part in range(2):
        lists_of_counts([block[part] for of_tensor in blocks for block in of_tensor])
    return {
        name: Tensor(
            dtype=dtype,
            requires_grad=bool(requires_grad),
            pin_memory=bool(pin_memory),
            memory_format=memory_format,
            size=tuple(size),
            blocks=tuple((tuple(offsets), tuple(lengths)) for offsets, lengths in of_tensor),
        )
        for name, dtype, requires_grad, pin_memory, memory_format, size, of_tensor in zip(
            names, dtypes, columns[1], columns[2], formats, sizes, blocks, strict=True
        )
    }


def _items(rows: Any, names: list[str], files: dict[str, int]) -> Iterator[Item]:
    columns = dict(zip(ITEM_COLUMNS, columns_of(rows, len(ITEM_COLUMNS)), strict=True))
    for column in ("name", "frame_digest", "digests"):
        texts(columns[column])
    for column in ("file", "start", "length", "payload_start", "payload_length"):
        counts(columns[column])
    texts(present(columns["dtype"]))
    counts(present(columns["index"]))
    for column in ("offset", "shape"):
        lists_of_counts(present(columns[column]))
        columns[column] = tuple(as_tuples(columns[column]))
    streams = [kind for kind in columns["kind"] if isinstance(kind, list)]
    require(all(streams), "an item has no transforms")
    texts([descriptor for of_item in streams for descriptor in of_item])
    kinds = {kind for kind in columns["kind"] if not isinstance(kind, list)}
    require(kinds <= _KINDS, "an item is of no known kind")
    for row in zip(*columns.values(), strict=True):
        name, offset, index, kind, dtype, shape, file, start, length, inner, inner_length, frame, digests = (
            row
        )
        item = Item(
            name=name,
            offset=offset,
            index=index,
            kind="stream" if isinstance(kind, list) else kind,
            dtype=dtype,
            shape=shape,
            file=names[file],
            start=start,
            length=length,
            payload_start=inner,
            payload_length=inner_length,
            frame_digest=int(frame, 16),
            digests=tuple(_digests(digests)),
            transforms=tuple(kind) if isinstance(kind, list) else (),
        )
        _check_item(item, files)
        yield item


def _digests(text: str) -> Sequence[int]:
    if len(text) == 16:  # most items
        return (int(text, 16),)
    if len(text) % 16:
        raise ValueError(f"{text[:100]!r} are no checksums")
    return struct.unpack(f">{len(text) // 16}Q", bytes.fromhex(text))


def _check_item(item: Item, files: dict[str, int]) -> None:
    if item.start + item.length > files[item.file]:
        raise ValueError(f"{item.name!r} reaches beyond its file")
    if item.payload_start + item.payload_length > item.length:
        raise ValueError(f"the payload of {item.name!r} is too long")
    if len(item.digests) != granules(item.payload_length):
        raise ValueError(f"{item.name!r} has too few or many checksums")
    if item.kind == "tensor":
        if item.dtype is None or item.shape is None:
            raise ValueError(f"{item.name!r} has no dtype or no shape")
        if item.payload_length % max(math.prod(item.shape), 1):
            raise ValueError(f"{item.name!r} is of another size than its shape")


def _text(value: object) -> str:
    require(isinstance(value, str), f"{value!r} stands where a text should")
    return cast(str, value)


def _count(value: object) -> int:
    return counts([value])[0]


def by_file(items: Sequence[Item]) -> Iterator[tuple[str, list[Item]]]:
    """Items grouped by file, each group ordered by where its items start."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.file, []).append(item)
    for name, group in groups.items():
        yield name, sorted(group, key=lambda item: item.start)
