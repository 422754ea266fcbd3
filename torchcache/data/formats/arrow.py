"""Arrow IPC: files, whose record batches are read alone, and streams, as `datasets` keeps them, read from the front.

Of a batch of a file only the columns asked for are read, and to count its rows only its header.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Final, cast

import pyarrow as pa

from torchcache.data.formats.arrow_headers import batch_rows
from torchcache.data.formats.base import BlockFormat, BlockReader, damaged
from torchcache.data.formats.parquet import checked_columns
from torchcache.errors import TorchCacheError

_MAGIC: Final = b"ARROW1"
_STREAM_BYTES: Final = 4 * 1024 * 1024
"""Of a stream, read at once."""


@dataclass(frozen=True)
class Arrow(BlockFormat):
    """A sample is a dict by column: all of them, or `columns`. A block is a record batch."""

    name: ClassVar[str] = "arrow"
    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".arrows", ".feather")

    columns: Sequence[str] | None = None

    def open(self, file: BinaryIO, where: str) -> ArrowReader:
        return ArrowReader(file, self.columns, where)


class ArrowReader(BlockReader):
    """One Arrow IPC file or stream, open."""

    def __init__(self, file: BinaryIO, columns: Sequence[str] | None, where: str) -> None:
        self._where = where
        self.seekable = file.read(len(_MAGIC)) == _MAGIC
        file.seek(0)
        self._file = file if self.seekable else io.BufferedReader(cast(io.RawIOBase, file), _STREAM_BYTES)
        self._options = pa.ipc.IpcReadOptions()
        self._batches = self._opened()
        schema = self._batches.schema
        self._columns = checked_columns(columns, schema, where)
        if self._columns:
            fields = sorted({at for name in self._columns for at in schema.get_all_field_indices(name)})
            self._options = pa.ipc.IpcReadOptions(included_fields=fields)
            self._file.seek(0)
            self._batches = self._opened()

    def rows(self) -> list[int]:
        if self.seekable:
            return batch_rows(self._file, self._where)
        counts = [batch.num_rows for batch in self._stream()]
        self._file.seek(0)
        self._batches = self._opened()
        return counts

    def read(self, block: int) -> Any:
        """For a stream `block` must be the one behind the last that was read."""
        batch = self._batch(block) if self.seekable else next(self._stream())
        table = pa.Table.from_batches([batch])
        table = table if self._columns is None else table.select(self._columns)
        try:
            # Arrow trusts the offsets in a file, and would read wherever they point.
            table.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise damaged(self._where, f"record batch {block} is malformed: {error}") from error
        return table

    def _batch(self, number: int) -> pa.RecordBatch:
        try:
            return self._batches.get_batch(number)
        except TorchCacheError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise damaged(self._where, f"record batch {number} can't be read: {error}") from error

    def _opened(self) -> Any:
        opener = pa.ipc.open_file if self.seekable else pa.ipc.open_stream
        try:
            return opener(self._file, options=self._options)
        except TorchCacheError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise damaged(self._where, f"it is no Arrow IPC: {error}") from error

    def _stream(self) -> Iterator[pa.RecordBatch]:
        while True:
            try:
                batch = self._batches.read_next_batch()
            except StopIteration:
                return
            except TorchCacheError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise damaged(self._where, f"the stream can't be read on: {error}") from error
            yield batch
