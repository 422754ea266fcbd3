"""What comes over the wire and is no call, on both ports: nobody but its sender notices."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.hostile import http2
from tests.hostile.hostile_server import ADMIN, HostileServer
from tests.hostile.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH,
    RST,
    SETTINGS,
    WINDOW,
    field,
    frame,
    message,
    request,
    start,
)

INFO = "/torchcache.v1.Control/GetInfo"


def call(
    stream: int, content: bytes, *more: tuple[str, str], path: str = INFO, token: str | None = ADMIN
) -> bytes:
    headers = frame(HEADERS, request(path, token, *more), flags=END_HEADERS, stream=stream)
    return headers + frame(DATA, content, flags=END_STREAM, stream=stream)


def rapid_resets() -> Iterator[bytes]:
    """CVE-2023-44487."""
    yield start()
    block = request(INFO, ADMIN)
    for stream in range(1, 8001, 2):
        yield frame(HEADERS, block, flags=END_HEADERS, stream=stream)
        yield frame(RST, struct.pack(">I", 8), stream=stream)


def endless_headers() -> Iterator[bytes]:
    """CVE-2024-27316 and its kin: a header block that never ends."""
    yield start() + frame(HEADERS, request(INFO, None), stream=1)
    for number in range(200):
        yield frame(CONTINUATION, field(f"x-{number}", "v" * 8000), stream=1)


def hundred_thousand_headers() -> Iterator[bytes]:
    yield start() + frame(HEADERS, request(INFO, ADMIN), stream=1)
    block = field("x", "y") * 2500
    for number in range(40):
        yield frame(CONTINUATION, block, flags=END_HEADERS if number == 39 else 0, stream=1)


def remembered_headers() -> Iterator[bytes]:
    """A bomb: one header of 4 KB, and then a byte for each time it is meant again."""
    yield start()
    block = request(INFO, ADMIN) + http2.indexed_field("x", "v" * 4000) + b"\xbe" * 12_000
    yield frame(HEADERS, block, flags=END_HEADERS | END_STREAM, stream=1)


def many_calls() -> Iterator[bytes]:
    """More than may run at once, none of which ever ends its request."""
    yield start()
    block = request(INFO, ADMIN)
    for stream in range(1, 2001, 2):
        yield frame(HEADERS, block, flags=END_HEADERS, stream=stream)


def a_flood(one: bytes, count: int) -> Callable[[], Iterator[bytes]]:
    def parts() -> Iterator[bytes]:
        yield start()
        for _ in range(count // 100):
            yield one * 100

    return parts


def noise() -> Iterator[bytes]:
    yield random.Random(7).randbytes(200_000)


def noise_in_frames() -> Iterator[bytes]:
    chance = random.Random(8)
    yield start()
    for _ in range(500):
        kind, flags, stream = chance.randrange(12), chance.randrange(256), chance.randrange(8)
        yield frame(kind, chance.randbytes(chance.randrange(40)), flags=flags, stream=stream)


def all_of(*parts: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: iter(parts)


TLS_HELLO = bytes.fromhex("1603010200010001fc0303") + os.urandom(500)

SENT: dict[str, Callable[[], Iterator[bytes]]] = {
    "nothing": all_of(),
    "noise": noise,
    "noise in frames": noise_in_frames,
    "HTTP/1.1": all_of(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a line without an end": all_of(b"GET /" + b"a" * 300_000),
    "TLS": all_of(TLS_HELLO),
    "Redis": all_of(b"*1\r\n$4\r\nINFO\r\n" * 100),
    "half a beginning": all_of(http2.PREFACE[:12]),
    "a beginning and no settings": all_of(http2.PREFACE, frame(PING, bytes(8))),
    "a frame too long": all_of(start(), frame(DATA, b"x", stream=1, length=(1 << 24) - 1)),
    "a frame cut short": all_of(start(), frame(HEADERS, request(INFO, ADMIN)[:-9], length=5000, stream=1)),
    "frames nobody knows": a_flood(frame(200, b"x" * 50), 2000),
    "settings without end": a_flood(frame(SETTINGS, struct.pack(">HI", 4, 70_000)), 3000),
    "settings of odd length": all_of(start(), frame(SETTINGS, b"12345")),
    "settings that make no sense": all_of(start(), frame(SETTINGS, struct.pack(">HI", 4, 0xFFFFFFFF))),
    "a table of headers of 4 GB": all_of(start(), frame(SETTINGS, struct.pack(">HI", 1, 0xFFFFFFFF))),
    "pings without end": a_flood(frame(PING, bytes(8)), 10_000),
    "a ping of odd length": all_of(start(), frame(PING, b"123")),
    "rapid resets": rapid_resets,
    "resets of nothing": a_flood(frame(RST, struct.pack(">I", 8), stream=99), 2000),
    "headers without end": endless_headers,
    "a hundred thousand headers": hundred_thousand_headers,
    "headers that are remembered": remembered_headers,
    "a header of a table that isn't": all_of(start(), frame(HEADERS, b"\xff\xff\xff\x7f", flags=5, stream=1)),
    "headers of no length": all_of(start(), frame(HEADERS, b"", flags=5, stream=1)),
    "calls without end": many_calls,
    "data of no stream": all_of(start(), frame(DATA, b"x" * 100, stream=0)),
    "data of a stream not begun": all_of(start(), frame(DATA, b"x" * 100, stream=77)),
    "an even stream": all_of(start(), frame(HEADERS, request(INFO, ADMIN), flags=5, stream=2)),
    "streams backwards": all_of(start(), call(9, message(b"")), call(3, message(b""))),
    "the last stream there can be": all_of(start(), call(0x7FFFFFFF, message(b"")), call(1, message(b""))),
    "a window beyond its end": a_flood(frame(WINDOW, struct.pack(">I", 0x7FFFFFFF)), 100),
    "a window of nothing": all_of(start(), frame(WINDOW, bytes(4))),
    "a stream that depends on itself": all_of(start(), frame(PRIORITY, struct.pack(">IB", 1, 0), stream=1)),
    "a promise of a client": all_of(start(), frame(PUSH, struct.pack(">I", 2), flags=4, stream=1)),
    "goodbye, and on": all_of(start(), frame(GOAWAY, bytes(8)), call(1, message(b""))),
    "padding longer than its frame": all_of(start(), frame(DATA, b"\xff123", flags=8, stream=1)),
}


def port(server: HostileServer, name: str) -> tuple[str, int]:
    return server.address if name == "control" else server.data_address


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("to", ["control", "data"])
@pytest.mark.parametrize("name", SENT)
def test_what_is_no_call_harms_nobody(server: HostileServer, name: str, to: str) -> None:
    http2.send(port(server, to), SENT[name]())


MESSAGES = {
    "a length of 4 GB": message(b"x", length=0xFFFFFFFF),
    "longer than it is": message(b"x", length=1000),
    "shorter than it is": message(b"x" * 1000, length=1),
    "compressed by nobody": message(b"x" * 100, compressed=1),
    "compressed, and so it says": message(b"x" * 100, compressed=1, length=50),
    "no prefix": b"x",
    "a prefix without a message": message(b"", length=5),
    "none": b"",
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_lies_of_its_length_is_not_answered_with_good(
    server: HostileServer, name: str
) -> None:
    """To a call that is otherwise right: GetInfo by the administrator."""

    def answered(said: bytes) -> bool:
        return any(kind == DATA and stream == 1 for kind, stream, _ in http2.frames(said))

    good = [start(), call(1, message(b""))]
    assert answered(http2.send(server.address, good, listen_s=20, until=answered))
    assert not answered(http2.send(server.address, [start(), call(1, MESSAGES[name])], until=answered))


FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "compressed by gzip": (("grpc-encoding", "gzip"),),
    "a deadline that is none": (("grpc-timeout", "soon"),),
    "a deadline of the past": (("grpc-timeout", "0n"),),
    "a deadline of ages": (("grpc-timeout", "99999999H"),),
    "ten thousand characters": (("x-long", "v" * 10_000),),
    "a name in capitals": (("X-Upper", "v"),),
    "a line's end": (("x", "a\r\nauthorization: b"),),
    "a connection's own": (("connection", "close"),),
    "a length that isn't": (("content-length", "5"),),
    "a path twice": ((":path", "/torchcache.v1.Control/Evict"),),
    "binary that isn't": (("x-bin", "!!!"),),
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("to", ["control", "data"])
@pytest.mark.parametrize("name", FIELDS)
def test_odd_headers_harm_nobody(server: HostileServer, name: str, to: str) -> None:
    path = INFO if to == "control" else "/arrow.flight.protocol.FlightService/DoGet"
    http2.send(port(server, to), [start(), call(1, message(b""), *FIELDS[name], path=path)])


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("to", ["control", "data"])
@pytest.mark.parametrize("token", [None, "canary-nobody-5f1d0c6e9b27"])
def test_a_stranger_holds_no_call(server: HostileServer, to: str, token: str | None) -> None:
    """Others are answered while its requests don't come. Control refuses them by their headers, and they are gone;
    Flight looks at headers once a request is there."""
    path = INFO if to == "control" else "/arrow.flight.protocol.FlightService/DoGet"
    block = request(path, token)
    with socket.create_connection(port(server, to), timeout=20) as connection:
        connection.sendall(start())
        for stream in range(1, 801, 2):
            connection.sendall(frame(HEADERS, block, flags=END_HEADERS, stream=stream))
        ended = b""
        while to == "control" and sum(kind == HEADERS for kind, _, _ in http2.frames(ended)) < 100:
            heard = connection.recv(65536)
            assert heard, "the connection ended"
            ended += heard
        server.assert_unharmed()
