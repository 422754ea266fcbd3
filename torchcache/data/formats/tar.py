"""WebDataset's tar: the members that share a name up to the first dot of its last part are one sample.

A sample is a dict as webdataset gives it: the members' bytes by extension (in lower case), "__key__" and "__url__".
Members that aren't files, that have no extension, and those named `__...__` belong to no sample.

The tar is parsed here, since an index needs the place of every header and a frame is parsed without what stands before
it: ustar, GNU long names and large sizes, and pax's `path` and `size`. See POSIX.1-2017, pax; GNU tar manual, "Basic
Tar Format"; the grouping is that of webdataset's `base_plus_ext` and `group_by_keys`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torchcache.data.formats.base import MAX_RECORD_BYTES, RecordFormat, Stream, damaged, place, read_exactly
from torchcache.errors import IntegrityError

BLOCK: Final = 512
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META: Final = re.compile(r"__[^/]*__")
_FILES: Final = frozenset(b"0\0" + b"7")
_EMPTY: Final = frozenset(b"123456")
"""Links, devices, folders: nothing follows their header, whatever size it has."""

_LONG_NAME, _PAX, _SPARSE = b"LxS"
_DESCRIBING: Final = frozenset(b"LKxg")
_MAX_HEADER_BYTES: Final = 1 << 20
"""The most of a long name or of pax attributes that is read."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member: where its first header begins, its name, its content and whether it is a file."""

    start: int
    name: str
    data: bytes
    is_file: bool


class Tar(RecordFormat):
    """Shards of WebDataset."""

    name: ClassVar[str] = "tar"
    suffixes: ClassVar[tuple[str, ...]] = (".tar",)

    def frames(self, stream: Stream, where: str) -> Iterator[tuple[int, bytes]]:
        tape = _Recorder(stream)
        key: str | None = None
        start = 0
        for member in members(tape, where):
            found = split_name(member)
            if found is None or found[0] == key:
                continue
            if key is not None:
                yield start, tape.cut(member.start)
            else:
                tape.cut(member.start)
            key, start = found[0], member.start
        if key is not None:
            yield start, tape.cut(tape.at)

    def record(self, frame: memoryview, url: str, number: int) -> dict[str, Any]:
        where = place(url, number)
        sample: dict[str, Any] = {}
        for member in members(io.BytesIO(frame), where):
            found = split_name(member)
            if found is None:
                continue
            key, extension = found
            if sample.setdefault("__key__", key) != key:
                break  # the next sample's
            if extension in sample:
                raise damaged(where, f"sample {key!r} has two members {extension!r}")
            sample[extension] = member.data
        if not sample:
            raise damaged(where, "it holds no member of a sample")
        sample["__url__"] = url
        return sample


def split_name(member: Member) -> tuple[str, str] | None:
    """The (key, extension) of a member; None if it is of no sample."""
    match = _NAME.fullmatch(member.name) if member.is_file else None
    if match is None or _META.fullmatch(member.name):
        return None
    return match[1], match[2].lower()


def members(stream: Stream, where: str) -> Iterator[Member]:
    """The members of a tar, up to its end marker or the end of the stream, as some writers leave the marker out."""
    at = start = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = read_exactly(stream, BLOCK, where)
        if not header or header.count(0) == BLOCK:
            if long_name is not None or pax:
                raise damaged(where, f"the tar ends at byte {at} behind a header of another")
            return
        if len(header) < BLOCK:
            raise damaged(where, f"the tar is cut short in the header at byte {at}")
        _check_sum(header, at, where)
        kind = header[156]
        describes = kind in _DESCRIBING
        size = (
            0 if kind in _EMPTY else _checked_size(header, None if describes else pax.get("size"), at, where)
        )
        if kind == _SPARSE:
            raise damaged(where, f"the member at byte {at} is a sparse file, which can't be read")
        if describes and size > _MAX_HEADER_BYTES:
            raise damaged(where, f"the header at byte {at} claims {size:,} bytes of attributes")
        data = _content(stream, size, at, where)
        if kind == _LONG_NAME:
            long_name = _text(data)
        elif kind == _PAX:
            pax = _attributes(data, at, where)
        elif not describes:
            name = pax.get("path") or long_name or _header_name(header)
            is_file = kind in _FILES and not name.endswith("/")
            yield Member(start, name, data, is_file)
            long_name, pax = None, {}
            start = at + BLOCK + _padded(size)
        at += BLOCK + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _content(stream: Stream, size: int, at: int, where: str) -> bytes:
    padded = _padded(size)
    data = read_exactly(stream, padded, f"{where} at byte {at}")
    if len(data) < size:
        raise damaged(
            where, f"the tar is cut short: the member at byte {at} has {len(data):,} of {size:,} bytes"
        )
    return data[:size]


def _checked_size(header: bytes, pax_size: str | None, at: int, where: str) -> int:
    if pax_size is not None:
        if not (pax_size.isascii() and pax_size.isdigit() and len(pax_size) < 20):
            raise damaged(where, f"the pax header before byte {at} has no sound size")
        return int(pax_size)
    size = _number(header[124:136])
    if size is None or size < 0:
        raise damaged(where, f"the tar header at byte {at} has no sound size")
    return size


def _check_sum(header: bytes, at: int, where: str) -> None:
    stored = _number(header[148:156])
    if stored is None or stored != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise damaged(where, f"the tar header at byte {at} has a wrong checksum")


def _number(field: bytes) -> int | None:
    """A number of a header: octal text, or GNU's base 256. None if it is neither."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0x80 else value - (1 << (8 * (len(field) - 1)))
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    return int(text, 8) if all(0x30 <= digit <= 0x37 for digit in text) else None


def _attributes(data: bytes, at: int, where: str) -> dict[str, str]:
    """The attributes of a pax header: `<length> <key>=<value>\\n`, one behind the other."""
    found: dict[str, str] = {}
    place = 0
    while place < len(data):
        blank = data.find(b" ", place, place + 20)
        digits = data[place:blank] if blank > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        line = data[blank + 1 : place + length]
        key, separator, value = line.removesuffix(b"\n").partition(b"=")
        sound = len(digits) + 1 < length <= len(data) - place
        if not sound or not separator or not line.endswith(b"\n"):
            raise damaged(where, f"the pax header at byte {at} is malformed")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += length
    return found


def _header_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


class _Recorder:
    """A stream that keeps what went through it since the last cut: a sample's members are one frame."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._held = bytearray()
        self.at = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._held += data
        self.at += len(data)
        if len(self._held) > 2 * MAX_RECORD_BYTES:
            raise IntegrityError(f"a sample of the tar has more than {MAX_RECORD_BYTES:,} bytes")
        return data

    def cut(self, at: int) -> bytes:
        """What was read before byte `at`, since the last cut."""
        length = len(self._held) - (self.at - at)
        front = bytes(self._held[:length])
        del self._held[:length]
        return front
