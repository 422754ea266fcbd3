"""Whole numbers in a file that every process maps: as many as there are records take no memory of each worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from torchcache.data.iterable_order import Ints
from torchcache.data.manifest import map_file, write_file

_SCHEMA = pa.schema([("value", pa.int64())])


class MappedInts:
    """An array, read-only. Opened at first use in each process; pickles as the file's name and checksum."""

    def __init__(self, path: Path, checksum: str) -> None:
        self.path = path
        self._checksum = checksum
        self._open: Ints | None = None

    @classmethod
    def write(cls, values: Ints, folder: Path) -> MappedInts:
        """Writes them as a file in `folder`. Raises ConfigurationError if it can't be written."""

        def write(file: object) -> None:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                data = pa.py_buffer(np.ascontiguousarray(values, np.int64))
                column = pa.Array.from_buffers(pa.int64(), len(values), [None, data])
                writer.write_batch(pa.RecordBatch.from_arrays([column], schema=_SCHEMA))

        path, checksum, _ = write_file(folder, write)
        return cls(path, checksum)

    def __reduce__(self) -> tuple[object, ...]:
        return (MappedInts, (self.path, self._checksum))

    def array(self) -> Ints:
        """Raises ObjectNotFound if the file is gone, IntegrityError if it is damaged."""
        if self._open is None:
            batch = pa.ipc.open_file(map_file(self.path, self._checksum, "records")).get_batch(0)
            # Not by `to_numpy`, which imports pandas where that is installed: 25 MB of each worker.
            self._open = np.frombuffer(batch.column(0).buffers()[1], np.int64, len(batch))
        return self._open
