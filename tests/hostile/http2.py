"""HTTP/2 by hand, as no library would send it: frames, header blocks, gRPC's own prefix. RFC 9113, RFC 7541."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4


def frame(
    kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None
) -> bytes:
    """`length` is what it says of its payload, where that is a lie."""
    said = len(payload) if length is None else length
    return said.to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def start() -> bytes:
    """What a connection begins with."""
    return PREFACE + frame(SETTINGS)


def field(name: str, value: str) -> bytes:
    """A header, literal and not indexed."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


def indexed_field(name: str, value: str) -> bytes:
    """A header that the decoder is to remember: the newest is number 62 from then on."""
    return b"\x40" + _text(name.encode()) + _text(value.encode())


def _text(value: bytes) -> bytes:
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, said = len(value) - 127, b"\x7f"
    while rest >= 128:
        said += bytes([rest % 128 + 128])
        rest //= 128
    return said + bytes([rest]) + value


def request(path: str, token: str | None, *more: tuple[str, str]) -> bytes:
    """The header block of a gRPC call."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *([("authorization", f"Bearer {token}")] if token else []),
        *more,
    ]
    return b"".join(field(*each) for each in fields)


def message(content: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """gRPC's prefix and a message; `length` is what it says of itself, where that is a lie."""
    return struct.pack(">BI", compressed, len(content) if length is None else length) + content


def send(
    address: tuple[str, int],
    parts: Iterable[bytes],
    *,
    listen_s: float = 0.2,
    until: Callable[[bytes], bool] = lambda _: False,
) -> bytes:
    """Sends all of it, or as much as is taken, and then listens for a moment, or `until` enough was said."""
    said = b""
    with socket.create_connection(address, timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            connection.settimeout(listen_s)
            while len(said) < 1 << 20 and not until(said) and (heard := connection.recv(65536)):
                said += heard
        except (ConnectionError, TimeoutError):
            pass
    return said


def frames(said: bytes) -> list[tuple[int, int, bytes]]:
    """Kind, stream and payload of the frames in what a server said."""
    found = []
    while len(said) >= 9:
        length = int.from_bytes(said[:3], "big")
        found.append((said[3], int.from_bytes(said[5:9], "big"), said[9 : 9 + length]))
        said = said[9 + length :]
    return found
