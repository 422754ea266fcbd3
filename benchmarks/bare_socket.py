"""The limit of a network: one TCP connection, sendfile on one side, recv_into on the other.

Run as a script it is the server. A request is a count and as many record numbers; the answer is the records and nothing
else: no check, no framing. Over TLS the server sends out of the mapped file, since sendfile can't encrypt.
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import server


@dataclass(frozen=True)
class SocketClient:
    """One connection; `size` bytes a record."""

    connection: socket.socket
    size: int
    pid: int
    flags: int = socket.MSG_WAITALL

    def read(
        self,
        numbers: Sequence[int],
        into: Sequence[memoryview],
        each: Callable[[memoryview], object] | None = None,
    ) -> int:
        """Asks for all records at once and fills one buffer each; returns the bytes. `each` gets every record then."""
        self.connection.sendall(struct.pack(f"<{len(numbers) + 1}I", len(numbers), *numbers))
        done = 0
        for _, buffer in zip(numbers, into, strict=False):
            record = buffer[: self.size]
            done += self._receive_whole(record)
            if each is not None:
                each(record)
        return done

    def _receive_whole(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            got = self.connection.recv_into(buffer[done:], 0, self.flags)
            if not got:
                raise EOFError("the bare server went away")
            done += got
        return done


@contextmanager
def socket_client(path: Path, size: int) -> Iterator[SocketClient]:
    """A server process for the flat file at `path`, and a connection to it."""
    with (
        server("benchmarks.bare_socket", path, size) as child,
        socket.create_connection(("127.0.0.1", child.port)) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield SocketClient(connection, size, child.pid)


@contextmanager
def tls_client(path: Path, size: int, keys: Path) -> Iterator[SocketClient]:
    """The same over TLS: in the folder `keys` are ca.pem, server.pem and server-key.pem."""
    context = ssl.create_default_context(cafile=keys / "ca.pem")
    with (
        server("benchmarks.bare_socket", path, size, keys) as child,
        socket.create_connection(("127.0.0.1", child.port)) as plain,
    ):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            yield SocketClient(connection, size, child.pid, flags=0)


def _sendfile(connection: socket.socket, file: int, at: int, end: int) -> None:
    while at < end:
        at += os.sendfile(connection.fileno(), file, at, end - at)


def _serve(connection: socket.socket, send: Callable[[socket.socket, int, int], None], size: int) -> None:
    """Answers until the client ends it. `send` sends bytes [at, end) of the file."""
    with connection, connection.makefile("rb") as requests:
        while head := requests.read(4):
            count = struct.unpack("<I", head)[0]
            for number in struct.unpack(f"<{count}I", requests.read(4 * count)):
                send(connection, number * size, (number + 1) * size)


def _main() -> None:
    file, size = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
    context: ssl.SSLContext | None = None
    if len(sys.argv) > 3:
        keys = Path(sys.argv[3])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / "server.pem", keys / "server-key.pem")
    data = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))

    def send(connection: socket.socket, at: int, end: int) -> None:
        if context is None:
            _sendfile(connection, file, at, end)
        else:
            connection.sendall(data[at:end])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            threading.Thread(target=_serve, args=(connection, send, size), daemon=True).start()


if __name__ == "__main__":
    _main()
