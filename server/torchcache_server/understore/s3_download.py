"""One range of one S3 object on its way into a buffer: what to ask for, what to believe of the answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torchcache.errors import IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.model import ByteRange, ObjectInfo
from torchcache_server.understore.base import Counters, changed
from torchcache_server.understore.s3_names import S3Object

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

_PIECE_BYTES = 64 * 1024


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

    def attempt(self, client: S3Client, deadline: float) -> None:
        """One GET. Raises IntegrityError, ObjectChanged, ServerUnavailable and botocore's errors."""
        if self._whole:
            self._filled = 0
        reply = client.get_object(**self._request())
        try:
            self._check(reply)
            self._receive(reply["Body"], deadline)
        except BaseException:
            reply["Body"].close()
            raise

    def _request(self) -> dict[str, Any]:
        request = {
            "Bucket": self._target.bucket,
            "Key": self._target.key,
            "IfMatch": f'"{self._object.id.version}"',
        }
        return request if self._whole else {**request, "Range": f"bytes={self._start}-{self._range.end - 1}"}

    @property
    def _start(self) -> int:
        return self._range.start + self._filled

    def _check(self, reply: GetObjectOutputTypeDef) -> None:
        """Before a byte is used: is this the version, and are these the bytes, that were asked for?"""
        if reply.get("ETag", "").strip('"') != self._object.id.version:
            raise changed(self._target.uri)
        expected_bytes = self._range.end - self._start
        if reply.get("ContentLength") != expected_bytes:
            raise self._damaged(f"{reply.get('ContentLength')} bytes came for {expected_bytes}")
        shown = reply.get("ContentRange", "")
        if not self._whole and not shown.startswith(f"bytes {self._start}-{self._range.end - 1}/"):
            raise self._damaged(f"{shown or 'no range'} came for bytes {self._start}-{self._range.end - 1}")

    def _receive(self, body: StreamingBody, deadline: float) -> None:
        view = memoryview(self.buffer)
        while self._filled < len(view):
            if time.monotonic() >= deadline:
                raise ServerUnavailable(
                    f"{self._target.uri} came too slowly: {self._filled} of {len(view)} bytes in time",
                    object=self._target.uri,
                )
            count = body.readinto(view[self._filled : self._filled + _PIECE_BYTES])  # type: ignore[arg-type]
            if not count:
                raise self._damaged(f"it ended after {self._filled} of {len(view)} bytes")
            self._filled += count
            self._counters.add("read", requests=0, bytes=count)
        body.read(1)  # Only at its end does botocore compare the checksum.

    def _damaged(self, how: str) -> TorchCacheError:
        self._filled = 0
        return IntegrityError(f"{self._target.uri} arrives damaged: {how}", object=self._target.uri)
