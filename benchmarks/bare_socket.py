"""The limit of a network: one TCP connection, sendfile on one side, recv_into on the other.

Run as a script it is the server. A request is a count and as many record numbers; the answer is the records and nothing
else: no check, no framing.
"""

from __future__ import annotations

import os
import socket
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
            done += _receive_whole(self.connection, record)
            if each is not None:
                each(record)
        return done


def _receive_whole(connection: socket.socket, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        got = connection.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
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


def _serve(connection: socket.socket, file: int, size: int) -> None:
    with connection, connection.makefile("rb") as requests:
        while head := requests.read(4):
            count = struct.unpack("<I", head)[0]
            for number in struct.unpack(f"<{count}I", requests.read(4 * count)):
                at, end = number * size, (number + 1) * size
                while at < end:
                    at += os.sendfile(connection.fileno(), file, at, end - at)


def _main() -> None:
    file, size = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_serve, args=(connection, file, size), daemon=True).start()


if __name__ == "__main__":
    _main()
