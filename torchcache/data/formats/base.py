"""The contract between a dataset of shards and the formats of shards: one small class a format.

A *record format* (tar, TFRecord, JSON lines, raw) is a row of *frames*, one a record: `frames` cuts a stream into them,
`record` makes a sample of one. Where frames begin is all that an index holds; with it any record can be read alone. A
*block format* (Parquet, Arrow IPC) is read a block of rows at a time, through a file that can seek.

Names and lengths in a shard are input to distrust: a name never becomes a path, and no length is believed beyond
`MAX_RECORD_BYTES` or the end of the shard. What is malformed is IntegrityError, which names the shard and the place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Final, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchcache.errors import IntegrityError

MAX_RECORD_BYTES: Final = 1 << 30
"""The largest record, with its framing: 1 GiB."""


class Stream(Protocol):
    """What is read from the front."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none only at the end."""


class RecordFormat(ABC):
    """A format whose records can be told apart in a stream. Immutable; pickles."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @property
    def identity(self) -> str:
        """What of its settings decides which records there are: indices are kept under it."""
        return self.name

    @abstractmethod
    def frames(self, stream: Stream, where: str) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of each record's frame, in order. `where` is what errors call the shard.

        A frame may be followed by bytes that are no record; they belong to none. Raises IntegrityError where the
        stream can't be cut any further.
        """

    def starts(self, size_bytes: int, where: str) -> NDArray[np.uint64] | None:
        """Where the frames of a shard of `size_bytes` begin, and the last one ends; None if only its bytes tell."""
        return None

    @abstractmethod
    def record(self, frame: memoryview, url: str, number: int) -> Any:
        """The sample of a frame, which may be followed by bytes up to the next one. It shares no memory with it.

        It is record `number`, from 0, of the shard `url`. Raises IntegrityError.
        """


class BlockFormat(ABC):
    """A format that holds rows by column, in blocks. Immutable; pickles."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @property
    def identity(self) -> str:
        return self.name

    @abstractmethod
    def open(self, file: BinaryIO, where: str) -> BlockReader:
        """Opens a shard through `file`, which can seek. Raises IntegrityError."""


class BlockReader(ABC):
    """One shard of a block format, open."""

    seekable: bool = True
    """Whether a block can be read without those before it."""

    @abstractmethod
    def rows(self) -> list[int]:
        """The number of rows of each block."""

    @abstractmethod
    def read(self, block: int) -> Any:
        """A block as an Arrow table, of the columns asked for. Raises IntegrityError."""


Format = RecordFormat | BlockFormat


def read_exactly(stream: Stream, size: int, where: str) -> bytes:
    """`size` bytes of `stream`, or fewer at its end. Raises IntegrityError for more than a record may have."""
    if size > MAX_RECORD_BYTES:
        raise IntegrityError(
            f"{where} claims a record of {size:,} bytes; at most {MAX_RECORD_BYTES:,} are read", object=where
        )
    data = stream.read(size)
    if len(data) == size or not data:
        return data
    parts, missing = [data], size - len(data)
    while missing and (data := stream.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def damaged(where: str, what: str) -> IntegrityError:
    """The error of a shard or record that is not as its format says."""
    return IntegrityError(f"{where} is damaged: {what}", object=where)


def rows_of(table: Any, rows: Any, where: str) -> list[dict[str, Any]]:
    """The rows numbered `rows` of an Arrow table, each a dict of Python values by column. Raises IntegrityError."""
    try:
        found: list[dict[str, Any]] = table.take(rows).to_pylist()
    except (
        pa.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # texts that are no UTF-8, times out of range
        raise damaged(where, f"its values can't be read: {error}") from error
    return found


def place(url: str, number: int) -> str:
    """What errors call a record."""
    return f"record {number} of {url}"
