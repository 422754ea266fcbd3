"""How an object gets into S3: in one request, or in parts; either way it appears at once, whole, and conditionally."""

from __future__ import annotations

import io
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torchcache.errors import AlreadyExists, ConfigurationError, TorchCacheError, TransientError
from torchcache_server.understore.s3_client import S3Calls
from torchcache_server.understore.s3_names import S3Object

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

PART_BYTES = 8 * 1024 * 1024
COPIED_PART_BYTES = 128 * 1024 * 1024
"""S3 says nothing while it copies a part: so much it has copied long before a call is given up."""
_COPY_S = 60.0
"""Of a server that can't copy so much in that time it isn't asked for."""
_COPY_TRIES = 2
"""What fails to be copied is sent: one more try costs less than that, but many would only hold it up."""
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 4
_CLEANUP_S = 4.0

_WRITE_ID = "torchcache-write"
"""Metadata key by which an object says which write made it: so a writer whose answer was lost finds out."""


class _NotCopied(Exception):
    """S3 refuses or fails, or the source isn't what it was. Never leaves this module."""


def part_bytes(size: int) -> int:
    """Size of the parts of an object of `size` bytes: `PART_BYTES`, more only where S3's 10,000 parts don't suffice."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))


def regroup(pieces: Iterable[memoryview], size: int, block_bytes: int) -> Iterator[bytes]:
    """The bytes of `pieces` in blocks of `block_bytes`, the last one shorter.

    Raises ConfigurationError if they don't add up to `size`; then nothing must be made of the blocks.
    """
    block: list[memoryview] = []
    missing_bytes, room = size, block_bytes
    for piece in pieces:
        view = memoryview(piece).cast("B")
        missing_bytes -= len(view)
        while len(view) >= room:
            yield b"".join([*block, view[:room]])
            view = view[room:]
            block, room = [], block_bytes
        if len(view):
            block.append(view)
            room -= len(view)
    if missing_bytes:
        raise ConfigurationError(f"{size - missing_bytes} bytes were given for an object of {size}")
    if block:
        yield b"".join(block)


def upload(
    calls: S3Calls,
    target: S3Object,
    pieces: Iterable[memoryview],
    size: int,
    *,
    replaces: str | None,
    deadline: float,
) -> str:
    """Stores `pieces` as `target`; the ETag. `replaces` as in UnderStore.write. Raises AlreadyExists."""
    return _Upload(calls, target, replaces, deadline).run(pieces, size)


def copy(
    calls: S3Calls,
    source: S3Object,
    version: str,
    target: S3Object,
    size: int,
    *,
    replaces: str | None,
    deadline: float,
) -> str | None:
    """As `upload`, of the `size` bytes of `source`, copied by S3 itself. None if it won't; then nothing has changed.

    In parts, however few: what completes them can be conditional on every server where a write can.
    """
    if size <= PART_BYTES:  # as much work as to send them
        return None
    return _Upload(calls, target, replaces, deadline).copy(source, version, size)


class _Upload:
    """One write: who it is, and what must hold for it to take place."""

    def __init__(self, calls: S3Calls, target: S3Object, replaces: str | None, deadline: float) -> None:
        self._calls = calls
        self._target = target
        self._where: dict[str, Any] = {"Bucket": target.bucket, "Key": target.key}
        self._replaces = replaces
        self._deadline = deadline
        self._write_id = uuid.uuid4().hex

    def run(self, pieces: Iterable[memoryview], size: int) -> str:
        blocks = regroup(pieces, size, part_bytes(size))
        if size > PART_BYTES:
            return self._in_parts(lambda upload_id: self._send_parts(blocks, upload_id))
        body = b"".join(blocks)

        def put(client: S3Client) -> str:
            self._calls.counters.add("write", requests=0, bytes=len(body))
            return client.put_object(
                **self._where, Body=io.BytesIO(body), Metadata=self._metadata, **self._condition
            )["ETag"]

        return self._commit(put)

    def copy(self, source: S3Object, version: str, size: int) -> str | None:
        try:
            return self._in_parts(lambda upload_id: self._copy_parts(source, version, size, upload_id))
        except _NotCopied:
            return None

    def _in_parts(self, make_parts: Callable[[str], list[Any]]) -> str:
        upload_id = self._run(
            lambda client: client.create_multipart_upload(**self._where, Metadata=self._metadata)["UploadId"]
        )
        try:
            parts = make_parts(upload_id)
            return self._commit(
                lambda client: client.complete_multipart_upload(
                    **self._where, UploadId=upload_id, MultipartUpload={"Parts": parts}, **self._condition
                )["ETag"]
            )
        except BaseException:
            self._abort(upload_id)
            raise

    def _send_parts(self, blocks: Iterator[bytes], upload_id: str) -> list[Any]:
        """What CompleteMultipartUpload wants to know of each part. A few are under way at a time."""
        parts: list[Any] = []
        pending: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "upload-part") as threads:
            try:
                for number, block in enumerate(blocks, 1):
                    if len(pending) == _PARTS_AT_ONCE:
                        parts.append(pending.popleft().result())
                    pending.append(threads.submit(self._send_part, block, number, upload_id))
                parts += [part.result() for part in pending]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return parts

    def _send_part(self, block: bytes, number: int, upload_id: str) -> dict[str, Any]:
        def send(client: S3Client) -> dict[str, Any]:
            self._calls.counters.add("write", requests=0, bytes=len(block))
            # A file, not bytes: http.client gives bytes a single timeout for all of them, a file one for each piece.
            reply = client.upload_part(
                **self._where, UploadId=upload_id, PartNumber=number, Body=io.BytesIO(block)
            )
            checksums = {name: value for name, value in reply.items() if name.startswith("Checksum")}
            return {"PartNumber": number, "ETag": reply["ETag"], **checksums}

        return self._run(send)

    def _copy_parts(self, source: S3Object, version: str, size: int, upload_id: str) -> list[Any]:
        """As `_send_parts`. Raises _NotCopied."""
        parts: list[Any] = []
        for number, start in enumerate(range(0, size, COPIED_PART_BYTES), 1):
            last = min(start + COPIED_PART_BYTES, size) - 1

            def send(client: S3Client, number: int = number, start: int = start, last: int = last) -> Any:
                return client.upload_part_copy(
                    **self._where,
                    UploadId=upload_id,
                    PartNumber=number,
                    CopySource={"Bucket": source.bucket, "Key": source.key},
                    CopySourceIfMatch=f'"{version}"',
                    CopySourceRange=f"bytes={start}-{last}",
                )["CopyPartResult"]

            copied = self._run_copy(send, "write", self._target)
            checksums = {name: value for name, value in copied.items() if name.startswith("Checksum")}
            parts.append({"PartNumber": number, "ETag": copied["ETag"], **checksums})
        self._require_copied(source, version, size, upload_id)
        return parts

    def _require_copied(self, source: S3Object, version: str, size: int, upload_id: str) -> None:
        """Not every server looks at CopySourceIfMatch, or at CopySourceRange.

        What is at that version, and as long, still was so all the while.
        """
        found = self._run_copy(
            lambda client: client.head_object(Bucket=source.bucket, Key=source.key), "stat", source
        )
        if (found["ETag"].strip('"'), found["ContentLength"]) != (version, size):
            raise _NotCopied
        if size <= COPIED_PART_BYTES:
            return
        listed = self._run_copy(
            lambda client: client.list_parts(**self._where, UploadId=upload_id), "write", self._target
        )
        due = [min(COPIED_PART_BYTES, size - start) for start in range(0, size, COPIED_PART_BYTES)]
        there = [part["Size"] for part in listed.get("Parts", [])]
        if there != due[: len(there)] or not there:  # a page of them, in order
            raise _NotCopied

    def _run_copy(
        self, send: Callable[[S3Client], T], action: Literal["write", "stat"], target: S3Object
    ) -> T:
        """Raises _NotCopied: whatever fails here, the bytes can be sent."""
        deadline = min(self._deadline, time.monotonic() + _COPY_S)
        try:
            return self._calls.run(send, action=action, target=target, deadline=deadline, tries=_COPY_TRIES)
        except TorchCacheError as error:
            raise _NotCopied from error

    def _commit(self, send: Callable[[S3Client], str]) -> str:
        """Makes the object appear. A lost answer leaves a doubt: was that AlreadyExists our own first try?"""
        in_doubt = False

        def attempt() -> str:
            nonlocal in_doubt
            try:
                return self._calls.once(send, action="write", target=self._target, deadline=self._deadline)
            except (AlreadyExists, TransientError) as error:
                if in_doubt and (etag := self._landed()):
                    return etag
                in_doubt = in_doubt or isinstance(error, TransientError)
                raise

        try:
            etag = self._calls.retrier.run(attempt, uri=self._target.uri, deadline=self._deadline)
        except AlreadyExists as error:
            raise self._beaten() from error
        except TransientError:
            landed = self._landed() if in_doubt else None
            if landed is None:
                raise
            etag = landed
        return etag.strip('"')

    def _landed(self) -> str | None:
        """The ETag if our own bytes are there; None if not, or if nobody answers."""
        try:
            found = self._calls.once(
                lambda client: client.head_object(**self._where),
                action="stat",
                target=self._target,
                deadline=max(self._deadline, time.monotonic() + _CLEANUP_S),
            )
        except TorchCacheError:
            return None
        return found["ETag"] if found["Metadata"].get(_WRITE_ID) == self._write_id else None

    def _abort(self, upload_id: str) -> None:
        try:
            self._calls.once(
                lambda client: client.abort_multipart_upload(**self._where, UploadId=upload_id),
                action="write",
                target=self._target,
                deadline=max(self._deadline, time.monotonic() + _CLEANUP_S),
            )
        except TorchCacheError:
            pass  # The parts stay until the bucket's own rule for unfinished uploads sweeps them.

    def _run(self, send: Callable[[S3Client], T]) -> T:
        return self._calls.run(send, action="write", target=self._target, deadline=self._deadline)

    @property
    def _metadata(self) -> dict[str, str]:
        return {_WRITE_ID: self._write_id}

    @property
    def _condition(self) -> dict[str, Any]:
        if self._replaces is None:
            return {}
        return {"IfMatch": f'"{self._replaces}"'} if self._replaces else {"IfNoneMatch": "*"}

    def _beaten(self) -> AlreadyExists:
        uri = self._target.uri
        if self._replaces:
            message = f"{uri} is no longer at version {self._replaces}: another writer replaced or removed it"
        else:
            message = f"{uri} exists already"
        return AlreadyExists(message, object=uri)
