"""One HTTP/1.1 connection for GETs: an answer's head read in one go, its body received where it is to lie.

http.client parses a head as if it were a mail's, which is half of what a small object costs, and wakes for each piece
of a large one. So what an S3 says to a GET that it grants is read here: HTTP/1.1, 200 or 206, one Content-Length, no
other framing. Whatever isn't just that goes to http.client, as it came.
"""

from __future__ import annotations

import http.client
import io
import re
import select
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

HEAD_BYTES: Final = 64 * 1024
"""The longest head that is read here."""

_FIRST_BYTES: Final = 4096
"""Received of a head at a time. What comes with it of the body has to be copied."""

_HEAD_ENDS: Final = re.compile(rb"\n\r?\n")
_GRANTED: Final = re.compile(
    r"HTTP/1\.1 (?:200|206)(?: [^\r\n]*)?(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*)*"
)
_FIELD: Final = re.compile(r"\r\n([^:\r\n]+):[ \t]*([^\r\n]*)")
_ONCE: Final = frozenset({"connection", "content-length", "transfer-encoding"})
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_TIMEVAL: Final = struct.Struct("@ll")


_CUT: Final = "the server ended the connection within an answer's head"


class WholeHead(http.client.HTTPResponse):
    """An answer of which all of the head came, or an error.

    http.client takes a connection's end for the head's: of an object whose ETag was cut off it looks as if it had
    changed, of a length that was, as if it were shorter.
    """

    def begin(self) -> None:
        """Reads the head. Raises RemoteDisconnected where it isn't whole."""
        received = self.fp
        self.fp = cast(Any, _Lines(received))
        try:
            super().begin()
        finally:
            if self.fp is not None:
                self.fp = received


class _Lines:
    """What a head is read from, line by line."""

    def __init__(self, received: io.BufferedReader) -> None:
        self._received = received
        self.close = received.close

    def readline(self, limit: int) -> bytes:
        line = self._received.readline(limit)
        if not line:
            raise http.client.RemoteDisconnected(_CUT)
        return line


class Head(NamedTuple):
    """Of an answer that grants a GET. Names of `headers` are lower-case; `length` is the body's, in bytes."""

    headers: Mapping[str, str]
    length: int


def granted(head: bytes) -> Head | None:
    """What a head says, up to the empty line; None if it isn't that of a granted GET, plainly framed. Pure."""
    text = head.decode("latin-1")
    if _GRANTED.fullmatch(text) is None:
        return None
    fields = _FIELD.findall(text)
    # The first of a name stays.
    headers = {name.lower(): value.rstrip(" \t") for name, value in reversed(fields)}
    if len(headers) < len(fields) and not _ONCE.isdisjoint(_repeated(fields)):
        return None
    length = headers.get("content-length", "")
    if (
        _LENGTH.fullmatch(length) is None
        or "transfer-encoding" in headers
        or headers.get("connection", "keep-alive").lower() != "keep-alive"
    ):
        return None
    return Head(headers, int(length))


def _repeated(fields: Sequence[tuple[str, str]]) -> set[str]:
    """Names that come more than once."""
    return {name for name, count in Counter(name.lower() for name, _ in fields).items() if count > 1}


class Connection:
    """To one server, for one GET after the other: each answer is read to its end, or the connection closed.

    Its calls raise OSError (of which TimeoutError for a server that is silent for too long is one) and ProtocolError.
    """

    def __init__(
        self, netloc: str, *, tls: ssl.SSLContext | None, connect_s: float, patience_s: float
    ) -> None:
        """Connects within `connect_s`. Raises OSError, of which ssl.SSLError is one."""
        place = urlsplit(f"//{netloc}")
        host = place.hostname or ""
        self._tls = tls is not None
        self._ahead = memoryview(b"")  # of the body, came with the head
        self._socket = socket.create_connection((host, place.port or (443 if tls else 80)), connect_s)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=host)
                self._socket.settimeout(patience_s)
            else:
                # The kernel counts the time, and so may wait for a whole piece: not one call a packet, and a poll each.
                self._socket.settimeout(None)
                timeval = _TIMEVAL.pack(int(patience_s), int(patience_s % 1 * 1e6))
                for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    self._socket.setsockopt(socket.SOL_SOCKET, way, timeval)
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @property
    def is_spoiled(self) -> bool:
        """Whether the connection, which is idle, was closed, or says what nobody asked for."""
        return bool(self._poll.poll(0))

    def ask(self, path: str, headers: Mapping[str, str]) -> Head | http.client.HTTPResponse:
        """GETs `path` with just these `headers`. The answer's body comes from `readinto`, or from the response.

        Raises ValueError for what no header can hold, and http.client's errors.
        """
        lines = [f"GET {path} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
        request = "\r\n".join(lines)
        if not request.count("\r") == request.count("\n") == len(lines) - 1 or "\0" in request:
            raise ValueError("a header can't hold line breaks")
        try:
            self._socket.sendall(request.encode("latin-1"))
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        return self._answer()

    def _answer(self) -> Head | http.client.HTTPResponse:
        came = b""
        while True:
            piece = self._received()
            searched = max(0, len(came) - 2)
            came += piece
            end = _HEAD_ENDS.search(came, searched)
            if end is not None:
                # The line break before the empty line belongs to the last field.
                head, rest = granted(came[: end.start()].removesuffix(b"\r")), came[end.end() :]
                if head is None or len(rest) > head.length:
                    return self._by_http_client(came)
                self._ahead = memoryview(rest)
                return head
            if not piece:
                raise http.client.RemoteDisconnected(_CUT)
            if len(came) >= HEAD_BYTES:
                return self._by_http_client(came)

    def _received(self) -> bytes:
        """What has come, `_FIRST_BYTES` at most; nothing if no more comes."""
        try:
            return self._socket.recv(_FIRST_BYTES)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def _by_http_client(self, came: bytes) -> http.client.HTTPResponse:
        """The standard library's view of an answer that begins with what `came`."""
        response = WholeHead(cast(Any, _Rest(self, came)), method="GET")
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        return response

    def readinto(self, view: memoryview) -> int:
        """Receives what follows of the body: all of `view` if that comes in time, else a part; 0 if no more comes."""
        if not self._ahead:
            return self._receive(view, whole=True)
        count = min(len(self._ahead), len(view))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def _receive(self, view: memoryview, *, whole: bool = False) -> int:
        if self._tls:
            return self._socket.recv_into(view)
        try:
            return self._socket.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def close(self) -> None:
        self._socket.close()


class _Rest(io.RawIOBase):
    """What came of an answer, and then what else comes: as http.client takes a socket."""

    def __init__(self, connection: Connection, came: bytes) -> None:
        self._connection = connection
        self._came = memoryview(came)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not self._came:
            return self._connection._receive(view)
        count = min(len(self._came), len(view))
        view[:count] = self._came[:count]
        self._came = self._came[count:]
        return count
