"""A real server for tests, forked off one that has done the imports or of its own, and the plainest client of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as fl
from torchcache_server.process.token_file import read_tokens

from tests.integration.store_process_parts import READY, ForkedServer
from torchcache.model import ObjectInfo, chunk_digest
from torchcache.wire.codec import WRITE_SCHEMA, Piece, decode_pieces, encode_chunks
from torchcache.wire.v1 import cache_pb2 as pb
from torchcache.wire.v1 import cache_pb2_grpc

START_S = 120


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "torchcache_server", *map(str, arguments)]


def refused(*arguments: object, environment: Mapping[str, str] | None = None, alone: bool = False) -> str:
    """Starts a server that must refuse to; returns what it said."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = _start(arguments, stdout.fileno(), stderr.fileno(), environment or {}, alone)
        try:
            code = process.wait(START_S)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        said = stderr.read()
        assert code == 2, said
        assert stdout.read() == ""
    assert "Traceback" not in said
    return said


def _start(
    arguments: Iterable[object], stdout: int, stderr: int, more: Mapping[str, str], alone: bool
) -> subprocess.Popen[bytes] | ForkedServer:
    if alone:
        return subprocess.Popen(command(*arguments), stdout=stdout, stderr=stderr, env=os.environ | more)
    return ForkedServer([*map(str, arguments)], stdout=stdout, stderr=stderr, more=more)


class ServerProcess:
    """A server that runs from entering to leaving, when it is killed if it still does.

    `alone` it is a `python -m torchcache_server` of its own, for who looks at what the process is and takes; else it is
    forked off one that has done the imports, nine tenths of a start.
    """

    def __init__(
        self,
        *arguments: object,
        token_file: Path,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        alone: bool = False,
    ) -> None:
        """What it says on stderr goes to `log`, or to a file without a name. Never to a pipe, which would fill."""
        self._arguments = arguments
        self._token_file = token_file
        self._environment = environment or {}
        self._log = log
        self._alone = alone

    def __enter__(self) -> ServerProcess:
        self._stderr = tempfile.TemporaryFile("w+") if self._log is None else self._log.open("w+")
        read, write = os.pipe()
        self._stdout = os.fdopen(read)
        self.process = _start(self._arguments, write, self._stderr.fileno(), self._environment, self._alone)
        os.close(write)
        line = self._stdout.readline()
        match = READY.fullmatch(line)
        if match is None:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not start: {line}{self._said()}")
        self.server_id, self.address = match[1], match[2]
        self.data_port = int(match[3]) if match[3].isdigit() else 0  # on a Unix socket there is none
        self.client = PlainClient(self.address, self.data_port, read_tokens(self._token_file)[0].secret)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._stdout.close()
        self._stderr.close()

    def _said(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 120) -> tuple[int, str]:
        """Signals the server and waits for its end: exit code and stderr."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s), self._said()


class PlainClient:
    """Calls by hand, so that what the server does is seen as it is."""

    def __init__(self, address: str, data_port: int, token: str, *, roots: bytes | None = None) -> None:
        self.token = token
        host = address.rpartition(":")[0]
        if address.startswith("unix://"):
            self.channel = grpc.insecure_channel(address)
            self.flight = fl.connect(f"grpc+{address}.data")
        elif roots is None:
            self.channel = grpc.insecure_channel(address)
            self.flight = fl.connect(f"grpc://{host}:{data_port}")
        else:
            self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(roots))
            self.flight = fl.connect(f"grpc+tls://{host}:{data_port}", tls_root_certs=roots)
        self.stub: Any = cache_pb2_grpc.ControlStub(self.channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.channel.close()
        self.flight.close()

    def call(self, method: str, request: Any, timeout_s: float = 60) -> Any:
        return getattr(self.stub, method)(request, timeout=timeout_s, metadata=self.metadata)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> Any:
        return fl.FlightCallOptions(headers=[(b"authorization", f"Bearer {self.token}".encode())], timeout=60)

    def status(self) -> Any:
        return self.call("GetStatus", pb.StatusRequest())

    def objects(self, store: str, prefix: str = "") -> Any:
        return self.call("ListObjects", pb.ListRequest(store=store, prefix=prefix)).objects

    def open(self, refs: Sequence[Any], **more: Any) -> Any:
        """The Flight reader of the whole of some objects."""
        request = pb.ReadRequest(
            namespace="n",
            objects=refs,
            object=range(len(refs)),
            offset=[0] * len(refs),
            length=[-1] * len(refs),
            **more,
        )
        return self.flight.do_get(fl.Ticket(request.SerializeToString()), self.options)

    def read(self, refs: Sequence[Any], **more: Any) -> list[bytes | str]:
        """Contents of some objects, verified, or the error text in the place of one."""
        return assemble(
            len(refs), (p for chunk in self.open(refs, **more) for p in decode_pieces(chunk.data))
        )

    def put(self, namespace: str, info: ObjectInfo, data: bytes) -> None:
        """Writes an object of one chunk, durably."""
        ref = pb.ObjectRef(store=info.id.store, key=info.id.key, version=info.id.version, size=info.size)
        request = pb.WriteRequest(namespace=namespace, objects=[ref], durable=True)
        descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())
        writer, metadata = self.flight.do_put(descriptor, WRITE_SCHEMA, self.options)
        writer.write_batch(encode_chunks([(0, 0, chunk_digest(data), pa.py_buffer(data))]))
        writer.done_writing()
        assert pb.WriteReply.FromString(metadata.read().to_pybytes()).bytes == len(data)
        writer.close()


def assemble(count: int, pieces: Iterable[Piece]) -> list[bytes | str]:
    parts = [bytearray() for _ in range(count)]
    errors: dict[int, str] = {}
    for piece in pieces:
        if piece.error is not None:
            errors[piece.extent] = piece.error
            continue
        piece.verify()
        assert piece.offset == len(parts[piece.extent])
        parts[piece.extent] += memoryview(piece.data)
    return [errors.get(i) or bytes(part) for i, part in enumerate(parts)]
