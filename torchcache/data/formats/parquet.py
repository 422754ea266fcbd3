"""Parquet: a row group is read alone, and of it only the columns asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from torchcache.data.formats.base import BlockFormat, BlockReader, damaged
from torchcache.errors import ConfigurationError, TorchCacheError


@dataclass(frozen=True)
class Parquet(BlockFormat):
    """A sample is a dict by column: all of them, or `columns`. A block is a row group."""

    name: ClassVar[str] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    columns: Sequence[str] | None = None

    def open(self, file: BinaryIO, where: str) -> ParquetReader:
        return ParquetReader(file, self.columns, where)


class ParquetReader(BlockReader):
    """One Parquet file, open."""

    def __init__(self, file: BinaryIO, columns: Sequence[str] | None, where: str) -> None:
        self._where = where
        try:
            self._file = pq.ParquetFile(file, pre_buffer=True)
        except TorchCacheError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise damaged(where, f"it is no Parquet: {error}") from error
        self._columns = checked_columns(columns, self._file.schema_arrow, where)

    def rows(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, block: int) -> Any:
        try:
            return self._file.read_row_group(block, columns=self._columns, use_threads=False)
        except TorchCacheError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise damaged(self._where, f"row group {block} can't be read: {error}") from error


def checked_columns(columns: Sequence[str] | None, schema: pa.Schema, where: str) -> list[str] | None:
    """The columns to read, None for all. Raises ConfigurationError naming one that isn't there, and IntegrityError."""
    if columns is None:
        return None
    try:
        names = schema.names
    except ValueError as error:
        raise damaged(where, f"the names of its columns can't be read: {error}") from error
    missing = [name for name in columns if name not in names]
    if missing:
        raise ConfigurationError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(names)}", object=where
        )
    return list(columns)
