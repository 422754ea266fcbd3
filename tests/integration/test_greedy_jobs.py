"""One job that asks for much and takes nothing: others get theirs, and the server's memory keeps its bound (F35)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from torchcache_server.service.admission import MAX_STREAMS

from tests.integration.server_process import PlainClient, ServerProcess
from torchcache.errors import Overloaded
from torchcache.model import CHUNK_BYTES, chunk_digest
from torchcache.wire.codec import WRITE_SCHEMA, decode_pieces, encode_chunks
from torchcache.wire.status import error_from_flight
from torchcache.wire.v1 import cache_pb2 as pb

FILES = 12
FILE_BYTES = 256 * 1024 * 1024
SMALL_BYTES = 5_000_000
MEMORY_BYTES = 1280 * 1024 * 1024
"""512 MiB of fills, 88 streams with what each has encoded and sent, and the process itself."""

PATIENT_S = 60.0
GREEDY_S = 110.0


@pytest.fixture
def server(tmp_path: Path, home: Path) -> Iterator[ServerProcess]:
    """Its store holds a part of one file. The files are holes: they cost neither disk nor time."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(FILES):
        with (source / f"large-{number:02d}").open("wb") as file:
            file.truncate(FILE_BYTES)
    for number in range(4):
        (source / f"small-{number}").write_bytes(bytes([number]) * SMALL_BYTES)
    with ServerProcess(
        *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "64MiB"),
        *("--under-store", f"file=file://{source}"),
        token_file=home / "token",
        alone=True,
    ) as server:
        yield server


def stream(client: PlainClient, ref: Any, namespace: str, timeout_s: float) -> Any:
    request = pb.ReadRequest(
        namespace=namespace, objects=[ref], object=[0], offset=[0], length=[-1], timeout_s=timeout_s
    )
    headers = [(b"authorization", f"Bearer {client.token}".encode())]
    options = fl.FlightCallOptions(headers=headers, timeout=timeout_s)
    return client.flight.do_get(fl.Ticket(request.SerializeToString()), options)


def content_of(reader: Any) -> bytes:
    pieces = [piece for chunk in reader for piece in decode_pieces(chunk.data)]
    for piece in pieces:
        assert piece.error is None, piece.error
        piece.verify()
    return b"".join(piece.data.to_pybytes() for piece in pieces)


def first_bytes(reader: Any) -> None:
    """Takes what comes until there are bytes: from then on the server has as much ready as it may."""
    while not reader.read_chunk().data.num_rows:
        pass


def test_who_takes_nothing_of_what_it_asked_for_keeps_nobody_else_waiting(server: ServerProcess) -> None:
    large, small = (server.client.objects("file", prefix) for prefix in ("large", "small"))
    with ExitStack() as closing:
        held = []
        for ref in large:
            held.append(stream(server.client, ref, "greedy", GREEDY_S))
            closing.callback(held[-1].cancel)
            if len(held) <= 3:  # these have all there is for one dataset; the others wait for them
                first_bytes(held[-1])
        found = [content_of(stream(server.client, ref, "modest", PATIENT_S)) for ref in small]
    assert found == [bytes([number]) * SMALL_BYTES for number in range(4)]


@pytest.mark.long
def test_memory_keeps_its_bound_while_more_is_asked_for_than_there_is_room(server: ServerProcess) -> None:
    """All streams there may be, of cold files that are read once and slowly; and a job that wants little meanwhile."""
    large, small = (server.client.objects("file", prefix) for prefix in ("large", "small"))
    ended = threading.Event()

    def flood(number: int) -> int:
        taken = 0
        while not ended.is_set():
            try:
                for chunk in stream(server.client, large[number % FILES], f"greedy-{number % 2}", GREEDY_S):
                    taken += chunk.data.nbytes
                    if ended.is_set():
                        break
            except fl.FlightError:
                pass  # too many at once
        return taken

    with ThreadPoolExecutor(MAX_STREAMS + 8) as threads:
        floods = [threads.submit(flood, number) for number in range(MAX_STREAMS + 8)]
        try:
            served = 0
            while served < 20:
                try:
                    number = served % 4
                    data = content_of(stream(server.client, small[number], "modest", PATIENT_S))
                except fl.FlightError:
                    continue
                assert data == bytes([number]) * SMALL_BYTES
                served += 1
        finally:
            ended.set()
        assert sum(one.result() for one in floods) > 4 * MEMORY_BYTES
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    peak_bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(f"peak {peak_bytes / 1e6:.0f} MB")
    assert peak_bytes < MEMORY_BYTES


WRITERS = MAX_STREAMS + 8
WRITERS_BYTES = 1_800_000_000
"""32 streams with a batch twice over, the first batches of those that are refused, and the process. Without a bound of
their own writers took 2.1 GB."""
BATCHES, CHUNKS_A_BATCH = 4, 3


@pytest.fixture
def roomy(tmp_path: Path, home: Path) -> Iterator[ServerProcess]:
    """Its store takes all that is written."""
    with ServerProcess(
        *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "5GB", "--min-free", "0"),
        *("--under-store", f"file=file://{tmp_path}"),
        token_file=home / "token",
        alone=True,
    ) as server:
        yield server


@pytest.mark.long
def test_memory_keeps_its_bound_while_many_write(roomy: ServerProcess) -> None:
    """Large batches by more streams than there may be; half of them stop in the middle, the others end (F35)."""
    data = bytes(CHUNK_BYTES)
    row, count = (chunk_digest(data), pa.py_buffer(data)), BATCHES * CHUNKS_A_BATCH
    ended = threading.Event()

    def write(number: int) -> None:
        """Raises what the server refuses it with."""
        ref = pb.ObjectRef(store="samples", key=f"{number}", version="1", size=count * len(data))
        request = pb.WriteRequest(namespace=f"flood-{number % 4}", objects=[ref])
        headers = [(b"authorization", f"Bearer {roomy.client.token}".encode())]
        options = fl.FlightCallOptions(headers=headers, timeout=GREEDY_S)
        descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())
        writer, metadata = roomy.client.flight.do_put(descriptor, WRITE_SCHEMA, options)
        try:
            with suppress(pa.ArrowInvalid, OSError):  # refused already: closing says why
                for first in range(0, count, CHUNKS_A_BATCH):
                    indices = range(first, first + CHUNKS_A_BATCH)
                    writer.write_batch(encode_chunks([(0, index, *row) for index in indices]))
                    if number % 2 and first:
                        ended.wait()
                        break
                writer.done_writing()
                while (answer := metadata.read()) and pb.WriteReply.FromString(answer.to_pybytes()).working:
                    pass
        finally:
            writer.close()

    def insist(number: int) -> int:
        """How often it was refused."""
        refused = 0
        while True:
            try:
                write(number)
                return refused
            except fl.FlightError as error:
                if ended.is_set() or number % 2:
                    return refused
                assert isinstance(error_from_flight(error), Overloaded), error
                refused += 1
                time.sleep(0.2)

    with ThreadPoolExecutor(WRITERS) as threads:
        writing = [threads.submit(insist, number) for number in range(WRITERS)]
        try:
            refused = sum(one.result() for one in writing[::2])
        finally:
            ended.set()
    status = Path(f"/proc/{roomy.process.pid}/status").read_text()
    peak_bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(f"peak {peak_bytes / 1e6:.0f} MB; {refused} times refused")
    assert peak_bytes < WRITERS_BYTES
