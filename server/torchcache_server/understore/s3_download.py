"""One range of one S3 object on its way into a buffer: what to ask for, what to believe of the answer."""

from __future__ import annotations

import base64
import hashlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchcache.errors import IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.model import ByteRange, ObjectInfo
from torchcache_server.understore.base import Counters, changed
from torchcache_server.understore.s3_names import S3Object

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from torchcache_server.understore.s3_plain import PlainGets, Reply, Way

_PIECE_BYTES = 1024 * 1024
"""The most between two looks at the clock."""

_SMALL_PIECE_BYTES = 64 * 1024

_DIGESTS: Mapping[str, Callable[[bytearray], bytes]] = {
    "crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
"""Of the checksums that S3 keeps with whole objects, those that the standard library knows."""


class Download:
    """Call `attempt` until it returns; `buffer` then holds the range.

    A range that broke off goes on where it stopped, at the same version. A whole object starts again: only so can the
    checksum that S3 sends with whole objects be checked.
    """

    def __init__(self, target: S3Object, object: ObjectInfo, range: ByteRange, counters: Counters) -> None:
        self.buffer = bytearray(range.length)
        self._target = target
        self._object = object
        self._range = range
        self._counters = counters
        self._whole = range.length == object.size
        self._filled = 0

    def attempt(
        self, client: S3Client, plain: PlainGets, asked: Callable[[], Way | None], deadline: float
    ) -> None:
        """One GET, plain if the bucket is known, else by `client`; `asked` is then the way that it took.

        Raises IntegrityError, ObjectChanged, ServerUnavailable and botocore's errors.
        """
        if self._whole:
            self._filled = 0
        way = plain.way(self._target.bucket)
        if way is not None:
            self._counters.add("read")
            reply = plain.get(way, self._target.key, self._headers())
            if reply is not None:
                self._take_plain(reply, deadline)
                return
            plain.learn(self._target.bucket, None)
        self._take(client.get_object(**self._request()), deadline)
        plain.learn(self._target.bucket, asked())

    def _take(self, reply: Any, deadline: float) -> None:
        """botocore's answer."""
        body = reply["Body"]
        try:
            self._check(reply.get("ETag", ""), reply.get("ContentLength"), reply.get("ContentRange", ""))
            # botocore loses what came of a piece that breaks off, so it is asked for less at a time.
            self._receive(lambda view: body.readinto(view[:_SMALL_PIECE_BYTES]), deadline)
            body.read(1)  # Only at its end does botocore compare the checksum.
        except BaseException:
            body.close()
            raise

    def _take_plain(self, reply: Reply, deadline: float) -> None:
        headers = reply.headers
        try:
            self._check(headers.get("etag", ""), reply.length, headers.get("content-range", ""))
            self._receive(reply.readinto, deadline)
            if self._whole:
                self._compare(headers)
        except BaseException:
            reply.close()
            raise
        reply.finish()

    def _request(self) -> dict[str, Any]:
        """As botocore calls it."""
        request = {
            "Bucket": self._target.bucket,
            "Key": self._target.key,
            "IfMatch": f'"{self._object.id.version}"',
        }
        return request if self._whole else {**request, "Range": self._range_header}

    def _headers(self) -> dict[str, str]:
        """The same request as HTTP has it."""
        match = {"if-match": f'"{self._object.id.version}"'}
        return {
            **match,
            **({"x-amz-checksum-mode": "ENABLED"} if self._whole else {"range": self._range_header}),
        }

    @property
    def _range_header(self) -> str:
        return f"bytes={self._start}-{self._range.end - 1}"

    @property
    def _start(self) -> int:
        return self._range.start + self._filled

    def _check(self, etag: str, length: int | None, shown: str) -> None:
        """Before a byte is used: is this the version, and are these the bytes, that were asked for?"""
        if etag.strip('"') != self._object.id.version:
            raise changed(self._target.uri)
        expected_bytes = self._range.end - self._start
        if length != expected_bytes:
            raise self._damaged(f"{length} bytes came for {expected_bytes}")
        if not self._whole and not shown.startswith(f"bytes {self._start}-{self._range.end - 1}/"):
            raise self._damaged(f"{shown or 'no range'} came for bytes {self._start}-{self._range.end - 1}")

    def _receive(self, readinto: Callable[[memoryview], int], deadline: float) -> None:
        view = memoryview(self.buffer)
        while self._filled < len(view):
            if time.monotonic() >= deadline:
                raise ServerUnavailable(
                    f"{self._target.uri} came too slowly: {self._filled} of {len(view)} bytes in time",
                    object=self._target.uri,
                )
            count = readinto(view[self._filled : self._filled + _PIECE_BYTES])
            if not count:
                raise self._damaged(f"it ended after {self._filled} of {len(view)} bytes")
            self._filled += count
            self._counters.add("read", requests=0, bytes=count)

    def _compare(self, headers: Mapping[str, str]) -> None:
        """The checksum of a whole object, where S3 has one; of an upload in parts it may be of another kind: a-b."""
        for name, digest in _DIGESTS.items():
            told = headers.get(f"x-amz-checksum-{name}", "")
            if told and "-" not in told and told != base64.b64encode(digest(self.buffer)).decode():
                raise self._damaged(f"its {name} isn't what the server says")

    def _damaged(self, how: str) -> TorchCacheError:
        self._filled = 0
        return IntegrityError(f"{self._target.uri} arrives damaged: {how}", object=self._target.uri)
