"""Where the bytes of a checkpoint lie: items in files, boxes of tensors in their rows. Pure, and free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchcache.model import CHUNK_BYTES, ByteRange
from torchcache.save_names import METADATA_NAME

ALIGNMENT_BYTES = 64
"""Items start at multiples of this in their file; torch aligns a tensor's bytes within an item the same way."""

GRANULE_BYTES = CHUNK_BYTES
"""An item's payload has one checksum for each so many bytes, counted from the payload's start."""

MOST_FILE_BYTES = 512 * 1024 * 1024
_LEAST_FILE_BYTES = 32 * 1024 * 1024
_NO_FILE_BYTES = CHUNK_BYTES
_SEGMENT_BYTES = 16 * CHUNK_BYTES
"""What a segment of the store takes, unless the store is small; with it some 100 KiB, as of frames around tensors."""

_WORTH_A_REQUEST_BYTES = 64 * 1024


def file_name(rank: int, number: int) -> str:
    """The name torch's FileSystemWriter gives the `number`-th file of `rank`."""
    return f"__{rank}_{number}.distcp"


def part_name(rank: int) -> str:
    """The part of a checkpoint that `rank` commits for itself when ranks save without collectives."""
    return f"__{rank}"


def metadata_name(part: str) -> str:
    """The file that holds torch's Metadata: `.metadata`, or `__<rank>.metadata` of a part."""
    return f"{part}{METADATA_NAME}"


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def assign_files(sizes: Sequence[int], *, writers: int, most_bytes: int = MOST_FILE_BYTES) -> list[range]:
    """Cuts items of `sizes` bytes, in order, into runs of neighbours: one run a file.

    Enough files to keep `writers` busy twice over, but none is cut small, and none is cut larger than `most_bytes`
    unless one item alone is: what is being copied for a file is held in memory until the file is written. Large files
    are of whole segments of the store, as far as items go: of one that is hardly filled the pages aren't used again.
    """
    goal = min(max(sum(sizes) // (2 * writers), _LEAST_FILE_BYTES), most_bytes)
    if goal > _SEGMENT_BYTES:
        goal -= goal % _SEGMENT_BYTES
    runs: list[range] = []
    start = filled = before = 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > goal:
            runs.append(range(start, i))
            start, filled, before = i, 0, filled
        filled += size
    if runs and filled < _NO_FILE_BYTES and before + filled <= most_bytes:  # not worth the calls of its own
        start = runs.pop().start
    return [*runs, range(start, len(sizes))] if start < len(sizes) else runs


def granules(length: int) -> int:
    """How many checksums a payload of `length` bytes has."""
    return -(-length // GRANULE_BYTES)


def granule_cover(part: ByteRange, length: int) -> ByteRange:
    """The smallest run of whole granules of a payload of `length` bytes that covers `part`."""
    return ByteRange(
        part.start - part.start % GRANULE_BYTES, min(length, -(-part.end // GRANULE_BYTES) * GRANULE_BYTES)
    )


def cut(part: ByteRange, limit: int) -> Iterator[ByteRange]:
    """`part` in pieces of at most `limit` bytes, cut where granules meet. `limit` is a multiple of the granule."""
    start = part.start
    while start < part.end:
        end = min(part.end, start - start % GRANULE_BYTES + limit)
        yield ByteRange(start, end)
        start = end


@dataclass(frozen=True, slots=True)
class Box:
    """A box within a tensor of `shape`: `lengths` elements from `offsets` on, along each dimension."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether the box lies within the tensor."""
        return len(self.shape) == len(self.offsets) == len(self.lengths) and all(
            min(offset, length) >= 0 and offset + length <= size
            for size, offset, length in zip(self.shape, self.offsets, self.lengths, strict=True)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between neighbours along each dimension of the row-major tensor."""
        return tuple(math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))

    @property
    def first(self) -> int:
        """Number of the box's first element in the row-major tensor."""
        return sum(offset * stride for offset, stride in zip(self.offsets, self.strides, strict=True))

    def reads(self, item_bytes: int) -> list[ByteRange]:
        """What to read of a row-major tensor of elements of `item_bytes` to have the box: byte ranges, in order.

        The first starts with the box's first element, the last ends with its last. A gap too small to be worth a
        request of its own is read along. An empty box needs nothing.
        """
        if not math.prod(self.lengths):
            return []
        if self.lengths == self.shape:
            return [ByteRange(0, math.prod(self.shape) * item_bytes)]
        # Trailing dimensions that are taken whole, and the one before them, make one run of bytes.
        outer = len(self.shape)
        while outer and self.lengths[outer - 1] == self.shape[outer - 1]:
            outer -= 1
        outer = max(outer - 1, 0)
        ranges = [ByteRange(0, math.prod(self.lengths[outer:]) * item_bytes)]
        for d in reversed(range(outer)):
            stride, count = self.strides[d] * item_bytes, self.lengths[d]
            if len(ranges) == 1 and stride - ranges[0].length <= _WORTH_A_REQUEST_BYTES:
                ranges = [ByteRange(0, (count - 1) * stride + ranges[0].length)]
            else:
                ranges = [
                    ByteRange(i * stride + r.start, i * stride + r.end) for i in range(count) for r in ranges
                ]
        base = self.first * item_bytes
        return [ByteRange(base + r.start, base + r.end) for r in ranges]
