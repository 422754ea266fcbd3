"""GETs of one S3 without botocore, which takes five times the CPU time of all else that a small object costs.

botocore makes the first GET of each bucket, and its request is the model: where the bucket is, in which region, how
signed. What isn't as simple as that (no signature, another algorithm, a proxy) stays botocore's.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from functools import partial
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass
from xml.etree import ElementTree

from botocore.exceptions import ClientError, EndpointConnectionError, SSLError
from urllib3.exceptions import ProtocolError

from torchcache_server.understore.s3_connection import Connection, Head
from torchcache_server.understore.s3_signing import ALGORITHM, Keys, Scope, escaped, signed

LOOK_S: Final = 0.5
"""How often connections that nobody uses are looked at: a system call, which may make all others wait."""

_ERROR_BYTES: Final = 64 * 1024
_OWN: Final = {"x-amz-content-sha256", "x-amz-date", "x-amz-security-token", "x-amz-checksum-mode"}


@dataclass(frozen=True, slots=True)
class Way:
    """How to get at a bucket's objects."""

    scheme: str
    netloc: str
    before_key: str
    """The path up to the key, escaped."""
    scope: Scope
    agent: str

    @classmethod
    def of(cls, url: str, headers: Mapping[str, Any], key: str) -> Way | None:
        """From a request of botocore's for `key`; None if it is one that can't be made here."""
        parts = urlsplit(url)
        algorithm, _, told = _text(headers.get("Authorization", "")).partition(" Credential=")
        scope = told.partition(",")[0].split("/")[-4:]
        plain = (
            algorithm == ALGORITHM
            and len(scope) == 4
            and not parts.query
            and unquote(parts.path).endswith(f"/{key}")
            and parts.path.endswith(escaped(key))
            and {name for name in map(str.lower, headers) if name.startswith("x-amz-")} <= _OWN
            and not _proxied(parts)
        )
        if not plain:
            return None
        before = parts.path.removesuffix(escaped(key))
        agent = _text(headers.get("User-Agent", "torchcache"))
        return cls(parts.scheme, parts.netloc, before, Scope(scope[1], scope[2]), agent)


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _proxied(parts: SplitResult) -> bool:
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


class Reply:
    """An answer of 200 or 206. Read all of it and `finish`, or `close`. Names of `headers` are lower-case."""

    def __init__(
        self,
        connection: Connection,
        answer: Head | http.client.HTTPResponse,
        keep: Callable[[Connection], None],
    ) -> None:
        self._connection = connection
        self._keep = keep
        self._response = answer if isinstance(answer, http.client.HTTPResponse) else None
        self.length = answer.length or 0
        """Bytes of the body."""
        self._left = self.length
        self.headers: Mapping[str, str] = (
            answer.headers if isinstance(answer, Head) else _lowered(answer.headers)
        )

    def readinto(self, view: memoryview) -> int:
        """Fills the front of `view`, as far as the answer goes and comes in time. 0 at the answer's end."""
        if not self._left:
            return 0
        receive = self._connection.readinto if self._response is None else self._response.fp.readinto1
        count = receive(view[: self._left])
        if not count:
            raise ProtocolError(f"the answer ended {self._left} bytes too early")
        self._left -= count
        return count

    def finish(self) -> None:
        """The connection can be used again, if nothing is left of the answer, and nothing was odd about it."""
        if self._left or self._response is not None:
            self.close()
        else:
            self._keep(self._connection)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()


def _lowered(headers: Message) -> dict[str, str]:
    """Of a name that comes twice the first value."""
    return {name.lower(): value for name, value in reversed(headers.items())}


class PlainGets:
    """Connections to the servers of buckets, `patience_s` with each. Thread-safe."""

    def __init__(
        self, keys: Callable[[], Keys | None], authorities: str | None, patience_s: float, connect_s: float
    ) -> None:
        """`keys` are asked for at every request; `authorities` is a PEM file, None for those of the system."""
        self.keys = keys
        self._authorities = authorities
        self._patience_s = patience_s
        self._connect_s = connect_s
        self._ways: dict[str, Way] = {}
        self._idle: defaultdict[tuple[str, str], deque[Connection]] = defaultdict(deque)
        self._tls: ssl.SSLContext | None = None
        self._look_from: defaultdict[tuple[str, str], float] = defaultdict(float)  # monotonic
        self._closed = False
        self._lock = threading.Lock()

    def way(self, bucket: str) -> Way | None:
        """How to get at the bucket, if that is known."""
        return self._ways.get(bucket)

    def learn(self, bucket: str, way: Way | None) -> None:
        """From here on the bucket is reached so; None: by botocore."""
        if way is None:
            self._ways.pop(bucket, None)
        else:
            self._ways[bucket] = way

    def get(self, way: Way, key: str, headers: Mapping[str, str]) -> Reply | None:
        """The answer to a GET of `key` with `headers` (lower-case names); None if botocore has to ask for it: of no
        credentials, a redirect, an answer whose length isn't told.

        Raises ClientError for a refusal, errors of botocore, ProtocolError or OSError for a connection that failed.
        """
        keys = self.keys()
        if keys is None:
            return None
        path = way.before_key + escaped(key)
        told = {**headers, "host": way.netloc, "user-agent": way.agent}
        sent = signed(path, told, keys, way.scope, datetime.now(UTC))
        connection = self._connection(way)
        try:
            answer = connection.ask(path, sent)
            if isinstance(answer, Head) or (answer.status in (200, 206) and answer.length is not None):
                return Reply(connection, answer, partial(self._keep, way))
            refusal = _refusal(answer) if answer.status >= 300 else None
            connection.close()
        except http.client.HTTPException as error:
            connection.close()
            if isinstance(error, OSError):
                raise
            raise ProtocolError(str(error) or type(error).__name__, error) from error
        except BaseException:
            connection.close()
            raise
        if refusal is not None:
            raise refusal
        return None

    def close(self) -> None:
        """Closes what is idle, and each other connection once its answer has been read."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, defaultdict(deque)
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _connection(self, way: Way) -> Connection:
        while True:
            with self._lock:
                idle = self._idle[way.scheme, way.netloc]
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connected(way)
            if not connection.is_spoiled:
                return connection
            connection.close()

    def _connected(self, way: Way) -> Connection:
        if way.scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context(cafile=self._authorities)
        tls = self._tls if way.scheme == "https" else None
        endpoint = f"{way.scheme}://{way.netloc}"
        try:
            return Connection(way.netloc, tls=tls, connect_s=self._connect_s, patience_s=self._patience_s)
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=endpoint, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=endpoint, error=error) from error

    def _keep(self, way: Way, connection: Connection) -> None:
        """For the next GET. Those idle longest are closed here if the server has closed them; all, once closed."""
        ended = []
        with self._lock:
            place = way.scheme, way.netloc
            idle = self._idle[place]
            idle.append(connection)
            if self._closed or time.monotonic() >= self._look_from[place]:
                self._look_from[place] = time.monotonic() + LOOK_S
                while idle and (self._closed or idle[0].is_spoiled):
                    ended.append(idle.popleft())
        for one in ended:
            one.close()


def _refusal(response: http.client.HTTPResponse) -> ClientError | None:
    """What botocore would raise; None for a redirect, which it may follow."""
    body = response.read(_ERROR_BYTES)
    response.close()
    if 300 <= response.status < 400:
        return None
    said: dict[str, str] = {}
    with suppress(ElementTree.ParseError):
        fields = ElementTree.fromstring(body)  # noqa: S314 - bounded, and expat bounds what entities may become
        said = {field.tag.rpartition("}")[2]: field.text or "" for field in fields}
    return ClientError(
        {
            "Error": {"Code": said.get("Code", str(response.status)), "Message": said.get("Message", "")},
            "ResponseMetadata": {"HTTPStatusCode": response.status},  # type: ignore[typeddict-item]  # all of it that is read
        },
        "GetObject",
    )
