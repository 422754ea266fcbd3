"""A small S3 server that follows a script: for faults that no real server can be made to show.

It keeps objects in a dict and serves them rightly, conditions included. Each request first takes the next line of the
script, if there is one: a function that may answer in the server's place, and says so by returning True.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Held:
    """One object."""

    data: bytes
    metadata: dict[str, str] = field(default_factory=dict)
    part_sizes: list[int] = field(default_factory=list)

    def add_part(self, data: bytes) -> None:
        self.data += data
        self.part_sizes.append(len(data))

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


class Request(BaseHTTPRequestHandler):
    """One request, and the ways to answer it, right and wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    body = b""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _answer(self) -> None:
        owner = self.server.owner
        self.body = self._read_body()
        with owner.lock:
            owner.requests.append(f"{self.command} {self.path}")
            owner.ranges.append(self.headers.get("Range"))
            line = owner.script.pop(0) if owner.script else owner.always
        if line is None or not line(self):
            self.serve()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Expect") == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ---- right ----

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def serve(self) -> None:
        """Does what S3 does."""
        objects, query = (
            self.server.owner.objects,
            parse_qs(urlsplit(self.path).query, keep_blank_values=True),
        )
        found = objects.get(self.key)
        if self.command == "POST" and "uploads" in query:
            self.server.owner.pending[self.key] = Held(b"", self._metadata())
            self.reply(200, b"<R><UploadId>upload</UploadId></R>")
        elif self.command == "PUT" and "x-amz-copy-source" in self.headers:
            self.copy_part()
        elif self.command == "PUT" and "partNumber" in query:
            self.server.owner.pending[self.key].add_part(self.body)
            self.reply(200, headers={"ETag": '"part"'})
        elif self.command == "GET" and "uploadId" in query:
            sizes = self.server.owner.pending[self.key].part_sizes
            parts = [
                f"<Part><PartNumber>{n}</PartNumber><Size>{s}</Size></Part>" for n, s in enumerate(sizes, 1)
            ]
            self.reply(200, f"<R>{''.join(parts)}</R>".encode())
        elif self.command == "DELETE":
            (self.server.owner.pending if "uploadId" in query else objects).pop(self.key, None)
            self.reply(204)
        elif self.command in ("PUT", "POST"):
            self._store(found)
        elif found is None:
            self.refuse(404, "NoSuchKey")
        elif self.headers.get("If-Match", found.etag) != found.etag:
            self.refuse(412, "PreconditionFailed")
        else:
            self.send_object(found)

    def copy_part(self, *, whole: bool = False, any_version: bool = False) -> None:
        """UploadPartCopy; with what is wrong with it."""
        found = self.server.owner.objects.get(unquote(self.headers["x-amz-copy-source"]).lstrip("/"))
        if found is None:
            self.refuse(404, "NoSuchKey")
        elif not any_version and self.headers["x-amz-copy-source-if-match"] != found.etag:
            self.refuse(412, "PreconditionFailed")
        else:
            first, last = map(int, self.headers["x-amz-copy-source-range"].removeprefix("bytes=").split("-"))
            data = found.data if whole else found.data[first : last + 1]
            self.server.owner.pending[self.key].add_part(data)
            self.reply(200, b'<R><ETag>"part"</ETag></R>')

    def _metadata(self) -> dict[str, str]:
        return {k: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}

    def _store(self, found: Held | None) -> None:
        match, none_match = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if (none_match and found) or (match and (found is None or match != found.etag)):
            self.refuse(412, "PreconditionFailed")
            return
        if self.command == "POST":
            if self.key not in self.server.owner.pending:
                self.refuse(404, "NoSuchUpload")
                return
            held = self.server.owner.pending.pop(self.key)
        else:
            held = Held(self.body, self._metadata())
        self.server.owner.objects[self.key] = held
        self.reply(200, f"<R><ETag>{held.etag}</ETag></R>".encode(), headers={"ETag": held.etag})

    def send_object(
        self,
        held: Held,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """The object, or its range; `body`, `headers` and `then` are what is wrong with it."""
        status, data, extra = 200, held.data, {"ETag": held.etag, **held.metadata}
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, found.groups())
            status, data = 206, held.data[first : last + 1]
            extra["Content-Range"] = f"bytes {first}-{last}/{len(held.data)}"
        else:
            crc32 = struct.pack(">I", zlib.crc32(data))
            extra["x-amz-checksum-crc32"] = base64.b64encode(crc32).decode()
        extra["Content-Length"] = str(len(data))
        extra.update(headers or {})
        self.reply(status, data if body is None else body, headers=extra)
        if then:
            then()

    # ---- wrong ----

    def refuse(self, status: int, code: str, *, headers: dict[str, str] | None = None) -> None:
        self.reply(
            status, f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode(), headers=headers
        )

    def reply(self, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def reset(self) -> None:
        """Ends the connection with a RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def stall(self) -> None:
        """Says nothing more until the test is over."""
        self.close_connection = True
        self.server.owner.over.wait()


Line = Callable[[Request], bool]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: ScriptedS3) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), Request)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        try:
            super().shutdown_request(request)
        except OSError:
            pass  # Reset already.

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up, or a line that closed the connection: part of the play."""


class ScriptedS3:
    """The server. `script`: what the next requests meet; `always`: what all others do."""

    def __init__(self) -> None:
        self.objects: dict[str, Held] = {}
        self.pending: dict[str, Held] = {}
        self.script: list[Line] = []
        self.always: Line | None = None
        self.requests: list[str] = []
        self.ranges: list[str | None] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self._server = _Server(self)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
