"""Records of mapped segments that this process knows: their headers were found sound, and they are in memory."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import xxhash

from torchcache.lanes.local_segments import Mapped
from torchcache.mappings import populate
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES
from torchcache.records import IDENTITY_AT, PAGE_BYTES, sound_record, stated_length

MAX_KNOWN: Final = 65_536
"""Records known at a time: some 20 MB of them."""

_hash = xxhash.xxh3_64_intdigest


class Known(NamedTuple):
    """A record whose header is sound. Its payload is [start, end) of the segment's view."""

    identity: bytes
    chunk_index: int
    object_size: int
    view: memoryview
    start: int
    end: int
    digest: int
    mapped: Mapped
    digests_at: int  # of the payload's blocks


class KnownRecords:
    """Known records by their place, as the index has it packed. Thread-safe as far as each call goes.

    `warm` holds those whose pages are in memory by all that is known, for the reader to look into first.
    """

    def __init__(self) -> None:
        self.warm: dict[bytes | None, Known] = {}
        self._known: dict[bytes, Known] = {}

    def get(self, place: bytes, mapped: Mapped, offset: int) -> Known | None:
        """The record, in memory; None if there is no sound one. Raises OSError: the disk can't read it."""
        known = self._known.get(place)
        if known is None or known.mapped is not mapped:
            known = read_record(mapped, offset)
            if known is None:
                return None
            if len(self._known) >= MAX_KNOWN:
                self._halve()
            self._known[place] = known
        populate(mapped.address + known.start, known.end - known.start, may_ask=mapped.is_own)
        self.warm[place] = known
        if mapped.gone:  # meanwhile: it must not be kept from here
            self.forget(place)
        return known

    def forget(self, place: bytes | None) -> None:
        """Knows this one no more."""
        if place is not None:
            self._known.pop(place, None)
        self.warm.pop(place, None)

    def cool(self) -> None:
        """Their pages may have gone."""
        self.warm = {}

    def drop_gone(self) -> None:
        """Forgets what lies in segments that are wanted no more: it would keep them mapped."""
        self._known = {place: known for place, known in list(self._known.items()) if not known.mapped.gone}
        self.warm = {place: known for place, known in list(self.warm.items()) if not known.mapped.gone}

    def clear(self) -> None:
        """Knows none any more."""
        self._known, self.warm = {}, {}

    def _halve(self) -> None:
        """Every second one: epochs are cyclic, so the oldest are no worse than the others."""
        self._known = dict(list(self._known.items())[::2])
        self.warm = {}


def read_record(mapped: Mapped, offset: int) -> Known | None:
    """The record at `offset` of a segment, its header checked. Raises OSError: the disk can't read it."""
    view, size = mapped.view, len(mapped.view)
    if not 0 <= offset <= size - IDENTITY_AT:
        return None
    populate(mapped.address + offset, min(PAGE_BYTES, size - offset), may_ask=mapped.is_own)
    length = stated_length(view, offset)
    if length > PAGE_BYTES:
        populate(mapped.address + offset, min(length, size - offset), may_ask=mapped.is_own)
    found = sound_record(view, offset, mapped.nonce, offset, size)
    if found is None:
        return None
    length, payload_bytes, chunk_index, object_size, digest, identity_bytes = found
    if payload_bytes != max(0, min(CHUNK_BYTES, object_size - chunk_index * CHUNK_BYTES)):
        return None
    digests_at = offset + IDENTITY_AT + identity_bytes
    identity = bytes(view[offset + IDENTITY_AT : digests_at])
    start = offset + length
    return Known(
        *(identity, chunk_index, object_size, view, start, start + payload_bytes, digest, mapped, digests_at)
    )


def is_intact(known: Known, start: int, end: int) -> bool:
    """Whether the bytes [start, end) of the segment, which lie in the record's payload, are as they were stored.

    By the whole payload's checksum, unless less than half of its blocks will do.
    """
    if start == end and known.end > known.start:
        return True
    first, last = (start - known.start) // BLOCK_BYTES, -(-(end - known.start) // BLOCK_BYTES)
    view = known.view
    if 2 * (last - first) * BLOCK_BYTES >= known.end - known.start:
        return bool(_hash(view[known.start : known.end]) == known.digest)
    digests = struct.unpack_from(f"<{last - first}Q", view, known.digests_at + 8 * first)
    at = known.start + first * BLOCK_BYTES
    for digest in digests:
        if _hash(view[at : min(at + BLOCK_BYTES, known.end)]) != digest:
            return False
        at += BLOCK_BYTES
    return True
