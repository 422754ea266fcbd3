"""The connection of plain GETs: it reads what http.client would, however the answer comes, and leaves it the rest."""

from __future__ import annotations

import http.client
import io
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.understore import s3_client
from torchcache_server.understore.s3_connection import Connection, Head, granted

BODY = bytes(range(256)) * 400
HEADERS = {"host": "h", "if-match": '"v"'}
GRANTED = b'HTTP/1.1 200 OK\r\nETag: "v"\r\nContent-Length: %d\r\n\r\n' % len(BODY)
ENOUGH_S = 60.0


def by_http_client(head: bytes) -> http.client.HTTPResponse:
    file = io.BytesIO(head + b"\r\n\r\n")
    response = http.client.HTTPResponse(cast(Any, SimpleNamespace(makefile=lambda mode: file)), method="GET")
    response.begin()
    return response


NAMES = st.sampled_from(
    [
        "Content-Length",
        "content-length",
        "ETag",
        "Connection",
        "Transfer-Encoding",
        "X-A",
        "Content-Range",
        "a b",
        "",
    ]
)
VALUES = st.sampled_from(
    [
        "0",
        "17",
        " 5 ",
        "5,5",
        "-1",
        "+5",
        "\u00b2",
        "keep-alive",
        "close",
        "chunked",
        '"v"',
        "",
        "é",
        "9" * 30,
    ]
)
LINES = st.tuples(NAMES, st.sampled_from([": ", ":", " : ", ""]), VALUES).map("".join)
HEADS = st.tuples(
    st.sampled_from(
        ["HTTP/1.1 200 OK", "HTTP/1.1 206 Partial", "HTTP/1.1 200", "HTTP/1.0 200 OK", "HTTP/1.1 404 No"]
    ),
    st.lists(LINES | st.just("Content-Length: 17") | st.just(" folded"), max_size=5),
    st.sampled_from(["\r\n", "\n"]),
).map(lambda parts: parts[2].join([parts[0], *parts[1]]).encode("latin-1"))


@given(head=HEADS)
def test_a_head_that_is_believed_is_what_http_client_reads(head: bytes) -> None:
    found = granted(head)
    if found is None:
        return
    response = by_http_client(head)
    assert response.status in (200, 206)
    assert (found.length, False, False) == (response.length, response.will_close, response.chunked)
    for name, value in found.headers.items():
        assert response.headers[name].strip() == value.strip()


@pytest.mark.parametrize(
    "change",
    [
        (b"HTTP/1.1 200", b"HTTP/1.1 404"),
        (b"HTTP/1.1 200", b"HTTP/1.0 200"),
        (b"HTTP/1.1 200", b"HTTP/1.1 100"),
        (b"Content-Length", b"Content-Size"),
        (b"ETag", b"Transfer-Encoding"),
        (b"ETag", b"Content-Length"),
        (b'ETag: "v"', b"Connection: close"),
        (b'ETag: "v"', b"no colon"),
        (b'ETag: "v"', b"A: b\r\n folded"),
        (b'ETag: "v"', b"A: b\nB: c"),
    ],
)
def test_what_is_not_plainly_granted_is_not_believed(change: tuple[bytes, bytes]) -> None:
    head = GRANTED.removesuffix(b"\r\n\r\n")
    assert granted(head) is not None
    assert granted(head.replace(*change)) is None


@contextmanager
def server(*answers: Sequence[bytes], silent: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Gives each request its answer, in these pieces, then ends the connection; if `silent`, when the test is over."""
    over, asked = threading.Event(), list[bytes]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(ENOUGH_S)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pieces in answers:
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        piece = client.recv(4096)
                        if not piece:
                            return
                        request += piece
                    asked.append(request)
                    for piece in pieces:
                        client.sendall(piece)
                if silent:
                    over.wait(ENOUGH_S)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            over.set()
            thread.join()


def connect(netloc: str, *, patience_s: float = ENOUGH_S) -> closing[Connection]:
    return closing(Connection(netloc, tls=None, connect_s=ENOUGH_S, patience_s=patience_s))


def body_of(connection: Connection, head: Head, piece_bytes: int = 1 << 20) -> bytes:
    """Read as a download does."""
    buffer = bytearray(head.length)
    filled = 0
    while filled < len(buffer):
        count = connection.readinto(memoryview(buffer)[filled : filled + piece_bytes])
        assert count, "the answer ended too early"
        filled += count
    return bytes(buffer)


@pytest.mark.parametrize(
    "at", [1, 12, len(GRANTED) - 3, len(GRANTED) - 1, len(GRANTED), len(GRANTED) + 1, len(GRANTED) + 5000]
)
def test_an_answer_comes_whole_wherever_it_is_cut(at: int) -> None:
    answer = GRANTED + BODY
    with server([answer[:at], answer[at:]], [answer]) as (netloc, asked), connect(netloc) as connection:
        for _ in range(2):
            head = connection.ask("/b/key", HEADERS)
            assert isinstance(head, Head)
            assert head.headers["etag"] == '"v"'
            assert body_of(connection, head, 60_000) == BODY
            assert not connection.is_spoiled or asked[1:]
    assert asked == [b'GET /b/key HTTP/1.1\r\nhost: h\r\nif-match: "v"\r\n\r\n'] * 2


def test_a_long_head_is_read_too() -> None:
    padding = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 500) for number in range(40))
    head = GRANTED.replace(b"ETag", padding + b"ETag")
    with server([head, BODY]) as (netloc, _), connect(netloc) as connection:
        found = connection.ask("/", HEADERS)
        assert isinstance(found, Head)
        assert body_of(connection, found) == BODY


@pytest.mark.parametrize(
    "answer",
    [
        GRANTED.replace(b"\r\n", b"\n") + BODY,
        GRANTED.replace(b"1.1", b"1.0") + BODY,
        b"HTTP/1.1 100 Continue\r\n\r\n" + GRANTED + BODY,
        GRANTED.replace(b"ETag", b"Connection: close\r\nETag") + BODY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
        GRANTED.replace(b"200 OK", b"404 Not Found") + BODY,
    ],
)
def test_any_other_answer_is_http_clients(answer: bytes) -> None:
    with server([answer[:7], answer[7:40], answer[40:]]) as (netloc, _), connect(netloc) as connection:
        response = connection.ask("/", HEADERS)
        assert isinstance(response, http.client.HTTPResponse)
        with closing(response):
            assert response.read() == BODY


def test_more_than_an_answer_is_no_plain_one() -> None:
    """Whatever follows would be taken for the next answer's."""
    answer = GRANTED.replace(b"%d" % len(BODY), b"3")
    with server([answer + b"abcHTTP/1.1"]) as (netloc, _), connect(netloc) as connection:
        response = connection.ask("/", HEADERS)
        if isinstance(response, Head):  # it came in two pieces, so the rest is still on its way
            assert body_of(connection, response) == b"abc"
        else:
            assert response.read() == b"abc"
            response.close()


def test_an_answer_before_the_bytes_were_sent_is_whole_too() -> None:
    """botocore reads its first line by itself, where it waited to be told to send what is to be written."""

    class Socket:
        def makefile(self, mode: str) -> io.BufferedReader:
            return io.BufferedReader(io.BytesIO(b'Content-Length: 0\r\nETag: "e831'))

    answer = s3_client.awsrequest.AWSHTTPResponse(Socket(), status_tuple=("HTTP/1.1", 200, "OK"))
    with pytest.raises(http.client.RemoteDisconnected), closing(answer):
        answer.begin()


def test_no_answer_is_an_error() -> None:
    with (
        server([b""]) as (netloc, _),
        connect(netloc) as connection,
        pytest.raises(http.client.RemoteDisconnected),
    ):
        connection.ask("/", HEADERS)


@pytest.mark.parametrize("came", [b"", GRANTED[:20]])
def test_a_server_that_says_nothing_is_given_up(came: bytes) -> None:
    with (
        server([came] if came else [], silent=True) as (netloc, _),
        connect(netloc, patience_s=0.2) as connection,
        pytest.raises(TimeoutError),
    ):
        connection.ask("/", HEADERS)


def test_one_that_falls_silent_amid_a_body_gives_what_came_first() -> None:
    came = 50_000
    with (
        server([GRANTED, BODY[:came]], silent=True) as (netloc, _),
        connect(netloc, patience_s=3.0) as connection,
    ):
        head = connection.ask("/", HEADERS)
        assert isinstance(head, Head)
        buffer = bytearray(head.length)
        filled = 0
        while filled < came:
            with suppress(TimeoutError):  # on a machine that has no time
                filled += connection.readinto(memoryview(buffer)[filled:])
        assert (filled, buffer[:filled]) == (came, BODY[:came])
        with pytest.raises(TimeoutError):
            connection.readinto(memoryview(buffer)[filled:])


@pytest.mark.parametrize("value", ["v\r\nx-other: 1", "v\n", "\0", "\u20ac"])
def test_what_is_no_header_is_not_sent(value: str) -> None:
    with server(silent=True) as (netloc, asked), connect(netloc) as connection:
        with pytest.raises(ValueError):
            connection.ask("/", {"if-match": value})
        assert not asked
        assert not connection.is_spoiled
