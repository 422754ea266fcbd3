"""The limit: Arrow Flight alone. A server that streams extents of one mapped file, and a client that takes them.

No look-up, no checksum, no cache: the batches are prepared once, before the clock runs. Two shapes: a batch an extent,
the obvious way, and batches of many BinaryView rows, the best way found. Run as a script it is the server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.flight as fl

from benchmarks.processes import server
from torchcache.wire.codec import BATCH_BYTES, binary_view_array

ONE_SCHEMA = pa.schema([("data", pa.binary())])
VIEW_SCHEMA = pa.schema([("data", pa.binary_view())])
MAX_ROW_BYTES = 4 * 1024 * 1024


def rows_of(path: Path, size: int, order: list[int]) -> list[pa.Buffer]:
    """Extent i of the file is bytes [i * size, (i + 1) * size); cut so that no row exceeds MAX_ROW_BYTES."""
    mapped = pa.memory_map(str(path), "r").read_buffer()
    rows = []
    for index in order:
        start, end = index * size, (index + 1) * size
        rows += [mapped.slice(at, min(MAX_ROW_BYTES, end - at)) for at in range(start, end, MAX_ROW_BYTES)]
    return rows


def batch_of_one(row: pa.Buffer) -> pa.RecordBatch:
    offsets = pa.array([0, row.size], pa.int32()).buffers()[1]
    return pa.RecordBatch.from_arrays(
        [pa.Array.from_buffers(pa.binary(), 1, [None, offsets, row])], schema=ONE_SCHEMA
    )


def batches_of_views(rows: list[pa.Buffer]) -> list[pa.RecordBatch]:
    batches, group, held = [], [], 0
    for row in rows:
        group.append(row)
        held += row.size
        if held >= BATCH_BYTES:
            batches.append(pa.RecordBatch.from_arrays([binary_view_array(group)], schema=VIEW_SCHEMA))
            group, held = [], 0
    if group:
        batches.append(pa.RecordBatch.from_arrays([binary_view_array(group)], schema=VIEW_SCHEMA))
    return batches


class BareServer(fl.FlightServerBase):
    """A ticket is the shape, a blank, and the record numbers; what it asks for is prepared once and kept."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._path, self._size = path, size
        self._prepared: dict[bytes, tuple[pa.Schema, list[pa.RecordBatch]]] = {}

    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.RecordBatchStream:
        if ticket.ticket not in self._prepared:
            self._prepared[ticket.ticket] = self._prepare(ticket.ticket)
        schema, batches = self._prepared[ticket.ticket]
        return fl.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches))

    def _prepare(self, ticket: bytes) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        shape, *numbers = ticket.split()
        rows = rows_of(self._path, self._size, [int(number) for number in numbers])
        if shape == b"one":
            return ONE_SCHEMA, [batch_of_one(row) for row in rows]
        return VIEW_SCHEMA, batches_of_views(rows)


@dataclass(frozen=True)
class FlightClient:
    """A client that takes what comes and touches nothing of it."""

    client: fl.FlightClient
    shape: bytes
    pid: int

    def read(self, numbers: Sequence[int]) -> int:
        """Asks for all records at once; returns the bytes."""
        return take(self.client, b" ".join([self.shape, *(b"%d" % number for number in numbers)]))


@contextmanager
def flight_client(path: Path, size: int, shape: Literal["one", "views"]) -> Iterator[FlightClient]:
    """A server process for the flat file at `path`, and a client of it."""
    with (
        server("benchmarks.bare_flight", path, size) as child,
        fl.connect(f"grpc://127.0.0.1:{child.port}") as client,
    ):
        yield FlightClient(client, shape.encode(), child.pid)


def take(client: fl.FlightClient, ticket: bytes) -> int:
    """Receives a whole stream, touches nothing; returns the payload's bytes."""
    reader = client.do_get(fl.Ticket(ticket))
    total = 0
    while True:
        try:
            batch = reader.read_chunk().data
        except StopIteration:
            return total
        data = batch.column(0).buffers()[2:]
        total += sum(buffer.size for buffer in data if buffer is not None)


if __name__ == "__main__":
    serving = BareServer(Path(sys.argv[1]), int(sys.argv[2]))
    print(serving.port, flush=True)
    serving.serve()
