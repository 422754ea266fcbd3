"""The limit: Arrow Flight alone. A server that streams extents of one mapped file, and a client that takes them.

No look-up, no checksum, no cache: the batches are prepared once, before the clock runs. Two shapes: a batch an extent,
the obvious way, and batches of many BinaryView rows, the best way found. Run as a script it is the server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl

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
    def __init__(self, path: Path, size: int, order: list[int]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        rows = rows_of(path, size, order)
        self.prepared = {
            b"one": (ONE_SCHEMA, [batch_of_one(row) for row in rows]),
            b"views": (VIEW_SCHEMA, batches_of_views(rows)),
        }

    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.RecordBatchStream:
        schema, batches = self.prepared[ticket.ticket]
        return fl.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches))


@contextmanager
def bare_server(path: Path, size: int, order: list[int]) -> Iterator[fl.FlightClient]:
    """Starts the server as a process of its own; gives a client of it."""
    command = [sys.executable, "-m", "benchmarks.bare_flight", str(path), str(size), *map(str, order)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with fl.connect(f"grpc://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.kill()
        process.wait()


def take(client: fl.FlightClient, shape: bytes) -> int:
    """Receives the whole stream, touches nothing; returns the payload's bytes."""
    reader = client.do_get(fl.Ticket(shape))
    total = 0
    while True:
        try:
            batch = reader.read_chunk().data
        except StopIteration:
            return total
        data = batch.column(0).buffers()[2:]
        total += sum(buffer.size for buffer in data if buffer is not None)


if __name__ == "__main__":
    server = BareServer(Path(sys.argv[1]), int(sys.argv[2]), [int(i) for i in sys.argv[3:]])
    print(server.port, flush=True)
    server.serve()
