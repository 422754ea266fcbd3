"""The server that all hostile cases of a file are played against, and what must hold after each of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import create_server, socket
from types import TracebackType
from typing import Any, Final, Self

import grpc
import pyarrow as pa
import pyarrow.flight as fl

from tests.integration.server_process import PlainClient, ServerProcess
from tests.unit.scripted_s3 import ScriptedS3
from torchcache.errors import TorchCacheError
from torchcache.wire.codec import WRITE_SCHEMA
from torchcache.wire.status import error_from_flight, error_from_status
from torchcache.wire.v1 import cache_pb2 as pb

MEMORY_BYTES: Final = 640 * 1024 * 1024
"""What the server may ever have held: twice what one message flood through pyarrow was seen to cost."""

SECRET: Final = b"what lies outside of the root is nobody's business"
CONTENT: Final = b"what everybody may read"
ADMIN, WRITE, READ = (f"canary-{scope}-5f1d0c6e9b27" for scope in ("admin", "write", "read"))
STORAGE: Final = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0KEYID",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-of-storage",
    "AWS_SESSION_TOKEN": "canary-session-of-storage",
}
SECRETS: Final = (ADMIN, WRITE, READ, STORAGE["AWS_SECRET_ACCESS_KEY"], STORAGE["AWS_SESSION_TOKEN"])
UNEXPECTED: Final = ("Traceback", "failed unexpectedly", "Exception ")
"""In the log: something was raised that nobody had thought of. A refusal must be one of ours."""


class HostileServer:
    """A real server on a store of its own, between a folder it serves and others that it must not touch.

    Under-stores: `file`, a folder; `s3`, any bucket of a scripted S3. `trap` listens where no call may ever go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.store = folder / "store"
        self._log = folder / "log"
        self._read_of_log = 0
        self.s3 = ScriptedS3()
        self.trap = Trap()
        for path in (self.source, folder / "outside", folder / "outside" / "sub"):
            path.mkdir()
        (self.source / "a").write_bytes(CONTENT)
        (folder / "outside" / "secret").write_bytes(SECRET)
        (self.source / "link-out").symlink_to("../outside")
        (self.source / "link-file").symlink_to("../outside/secret")
        (self.source / "link-in-a-circle").symlink_to("link-in-a-circle")
        (self.source / "pipes").mkdir()
        os.mkfifo(self.source / "pipes" / "pipe")
        self.token_file = folder / "token"
        self.token_file.write_text(f"{ADMIN}\nwrite {WRITE}\nread {READ}\n")
        self.token_file.chmod(0o600)

    def __enter__(self) -> Self:
        with ExitStack() as closing:
            closing.callback(self.trap.close)
            closing.enter_context(self.s3)
            self._start(closing)
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def _start(self, closing: ExitStack) -> None:
        server = ServerProcess(
            *("--listen", "127.0.0.1:0", "--store", self.store, "--capacity", "256MB"),
            *("--under-store", f"file=file://{self.source}", "--under-store", "s3=s3://"),
            *("--token-file", self.token_file, "--metrics-port", "0", "--drain-s", "0.2"),
            *("--log-level", "debug"),  # what it tells then, it might tell otherwise
            token_file=self.token_file,
            environment={"AWS_ENDPOINT_URL": self.s3.endpoint_url, "AWS_REGION": "us-east-1", **STORAGE},
            log=self._log,
            alone=True,
        )
        self._server = closing.enter_context(server)
        self.process = self._server.process
        self.client = self._server.client
        self._instance = self.client.call("GetInfo", pb.InfoRequest()).instance
        (self.ref,) = [ref for ref in self.client.objects("file") if ref.key == "a"]
        self.note_surroundings()

    @property
    def address(self) -> tuple[str, int]:
        """Of the control port."""
        host, _, port = self._server.address.rpartition(":")
        return host, int(port)

    @property
    def data_address(self) -> tuple[str, int]:
        return self.address[0], self._server.data_port

    def with_token(self, token: str) -> PlainClient:
        """Another client. The caller closes it."""
        return PlainClient(self._server.address, self._server.data_port, token)

    def raw(self, method: str, request: bytes, metadata: Any = None, timeout_s: float = 20) -> bytes:
        """A control call of bytes that nobody has checked."""
        call = self.client.channel.unary_unary(
            f"/torchcache.v1.Control/{method}", request_serializer=bytes, response_deserializer=bytes
        )
        given = self.client.metadata if metadata is None else metadata
        answer: bytes = call(request, timeout=timeout_s, metadata=given)
        return answer

    def ticket(self, ticket: bytes, client: PlainClient | None = None) -> list[Any]:
        """The batches that a ticket brings."""
        client = client or self.client
        return [chunk.data for chunk in client.flight.do_get(fl.Ticket(ticket), client.options)]

    def put(self, namespace: str, objects: Sequence[pb.ObjectRef], batches: Sequence[pa.RecordBatch]) -> int:
        """Writes by hand; the bytes that the server says it stored. Raises what the server refuses with."""
        request = pb.WriteRequest(namespace=namespace, objects=objects, durable=True)
        return self.put_raw(request.SerializeToString(), batches)

    def put_raw(
        self, command: bytes, batches: Sequence[pa.RecordBatch], schema: pa.Schema = WRITE_SCHEMA
    ) -> int:
        descriptor = fl.FlightDescriptor.for_command(command)
        writer, metadata = self.client.flight.do_put(descriptor, schema, self.client.options)
        try:
            with suppress(pa.ArrowInvalid, OSError):  # refused already: closing says why
                for batch in batches:
                    writer.write_batch(batch)
                writer.done_writing()
            answer = metadata.read()
        finally:
            writer.close()
        assert answer is not None
        return pb.WriteReply.FromString(answer.to_pybytes()).bytes

    # ---- what must hold after each case ----

    def note_surroundings(self) -> None:
        """What is there now is what must be there after each case."""
        self._surroundings = dict(self._listing())

    def _listing(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """All around the store: what there is, of which kind and size, and when it was changed."""
        left_out = {self.store, self._log}
        folders = [self.folder]
        while folders:
            for entry in os.scandir(folders.pop()):
                status = entry.stat(follow_symlinks=False)
                if Path(entry.path) in left_out:
                    continue
                # A folder's time changes with the temporary files of a refused write, which are gone again.
                changed_ns = 0 if entry.is_dir(follow_symlinks=False) else status.st_mtime_ns
                yield entry.path, (status.st_ino, status.st_mode, status.st_nlink, changed_ns)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))

    def assert_unharmed(self) -> None:
        """The same process answers on both ports, in bounded memory; nothing around it changed; its log is clean."""
        log = self._new_log()
        assert self.process.poll() is None, log
        assert self.instance() == self._instance
        assert self.client.read([self.ref]) == [CONTENT]
        assert self.peak_bytes() < MEMORY_BYTES
        before = self._surroundings
        self.note_surroundings()  # so that one case's harm isn't the next one's
        assert self._surroundings == before
        assert (self.folder / "outside" / "secret").read_bytes() == SECRET
        assert self.trap.callers == 0, "the server called where nobody had configured it to"
        log += self._new_log()
        assert not [word for word in UNEXPECTED if word in log], log
        assert not [secret for secret in SECRETS if secret in log]

    def instance(self) -> str:
        """Of the process that answers. Asked again for a while if it has too much to do: that is no harm."""
        deadline = time.monotonic() + 20
        while True:
            try:
                answer: str = self.client.call("GetInfo", pb.InfoRequest()).instance
                return answer
            except grpc.RpcError as error:
                busy = error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _new_log(self) -> str:
        with self._log.open(errors="replace") as file:
            file.seek(self._read_of_log)
            text = file.read()
            self._read_of_log = file.tell()
        return text

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def process_folder(self, name: str) -> Iterator[Path]:
        """What is in a folder of the process's own in /proc."""
        return Path(f"/proc/{self.process.pid}/{name}").iterdir()

    def peak_bytes(self) -> int:
        """The most that was ever resident."""
        return 1024 * int(self.status_field("VmHWM").split()[0])

    def status_field(self, name: str) -> str:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return dict(line.split(":", 1) for line in lines)[name].strip()


def refusal(call: Callable[[], object]) -> TorchCacheError:
    """The error of ours with which a call was refused. Fails if it wasn't, or by anything that isn't of ours."""
    try:
        call()
    except grpc.RpcError as error:
        assert (error.details() or "").startswith("{"), f"{error.code()}: {error.details()}"
        return error_from_status(error.code(), error.details())
    except fl.FlightError as error:
        assert error.extra_info.startswith(b"{"), error
        return error_from_flight(error)
    raise AssertionError("it was not refused")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error of ours with which it was refused; or that its time was over, as gRPC says."""
    try:
        return call()
    except grpc.RpcError as error:
        ours = (error.details() or "").startswith("{") or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert ours, f"{error.code()}: {error.details()}"
        return error_from_status(error.code(), error.details())


class Trap:
    """A listener that counts who comes."""

    def __init__(self) -> None:
        self.callers = 0
        self._socket: socket = create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="trap", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.callers += 1
            caller.close()

    def close(self) -> None:
        self._socket.shutdown(2)
        self._socket.close()
        self._thread.join(10)
