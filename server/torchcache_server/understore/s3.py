"""The under-store S3: AWS, and every server that speaks S3 with conditional requests, by boto3."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchcache.errors import (
    ConfigurationError,
    ObjectChanged,
    ObjectNotFound,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.model import ByteRange, ObjectId, ObjectInfo
from torchcache_server.understore.base import Counters, FolderPage, Listing, check_range
from torchcache_server.understore.retry import RetryPolicy
from torchcache_server.understore.s3_answers import continuation, listed, listed_folders, version_and_size
from torchcache_server.understore.s3_client import S3Calls
from torchcache_server.understore.s3_download import Download
from torchcache_server.understore.s3_errors import no_such_bucket, vanished
from torchcache_server.understore.s3_names import S3Object, S3Root
from torchcache_server.understore.s3_upload import copy, upload

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

_PAGE = 1000
SLOW_REFUSAL_S = 5.0
"""A server that takes so long to fail to copy isn't asked for ..."""
NO_COPIES_S = 600.0
"""... so long: whoever wants copies sends the bytes in less."""


class S3UnderStore:
    """Keys of a bucket, or of a prefix in one; with the root "s3://", keys begin with the bucket.

    Versions are ETags. Endpoint, region and, without `credentials`, who asks come from boto3's own settings
    (AWS_ENDPOINT_URL, AWS_PROFILE and so on). Folder markers (empty objects whose key ends in a slash) aren't listed.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        *,
        credentials: Mapping[str, str] | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._name = name
        self._root = S3Root.parse(uri)
        self._counters = Counters()
        self._calls = S3Calls(self._counters, credentials, policy)
        self._copies_from_s = 0.0  # monotonic

    @property
    def name(self) -> str:
        return self._name

    @property
    def uri(self) -> str:
        return self._root.uri

    @property
    def counters(self) -> Counters:
        return self._counters

    def set_credentials(self, credentials: Mapping[str, str]) -> None:
        """Uses these AWS_* variables from the next call on; empty: what boto3 finds."""
        self._calls.clients.replace_credentials(credentials)

    def list(self, prefix: str, *, start_after: str, limit: int, deadline: float) -> Listing:
        target = self._root.locate_prefix(prefix)
        request: dict[str, Any] = {"Bucket": target.bucket, "Prefix": target.key}
        if start_after:
            request["StartAfter"] = self._root.locate(start_after).key
        objects: list[ObjectInfo] = []
        while True:
            request["MaxKeys"] = min(_PAGE, limit - len(objects))
            page = self._page(target, request, deadline)
            objects += self._infos(target, page, request["MaxKeys"])
            token = continuation(page, target)
            if not token or len(objects) >= limit:
                return Listing(objects, bool(token))
            request["ContinuationToken"] = token

    def list_folder(
        self, prefix: str, *, token: str, deadline: float, start_after: str = ""
    ) -> FolderPage | None:
        target = self._root.locate_prefix(prefix)
        request: dict[str, Any] = {
            "Bucket": target.bucket,
            "Prefix": target.key,
            "Delimiter": "/",
            "MaxKeys": _PAGE,
        }
        if token:
            request["ContinuationToken"] = token
        elif start_after:
            if not start_after.startswith(prefix):
                raise ConfigurationError(f"{start_after!r} doesn't lie under {target.uri}")
            request["StartAfter"] = self._root.locate_prefix(start_after).key  # any text: it needn't be a key
        page = self._page(target, request, deadline)
        folders = [self._root.relative(found) for found in listed_folders(page, target, _PAGE)]
        return FolderPage(self._infos(target, page, _PAGE), folders, continuation(page, target))

    def _page(self, target: S3Object, request: dict[str, Any], deadline: float) -> ListObjectsV2OutputTypeDef:
        return self._calls.run(
            lambda client: client.list_objects_v2(**request), action="list", target=target, deadline=deadline
        )

    def _infos(self, target: S3Object, page: ListObjectsV2OutputTypeDef, asked: int) -> Sequence[ObjectInfo]:
        """The objects of a page, but for markers of folders."""
        return [self._info(*found) for found in listed(page, target, asked)]

    def stat(self, key: str, *, deadline: float) -> ObjectInfo:
        target = self._root.locate(key)
        try:
            found = self._calls.run(
                lambda client: client.head_object(Bucket=target.bucket, Key=target.key),
                action="stat",
                target=target,
                deadline=deadline,
            )
        except ObjectNotFound as error:
            raise self._without_bucket(target, deadline) or error from error
        return self._info(target, *version_and_size(found, "ContentLength", target))

    def read(self, object: ObjectInfo, range: ByteRange, *, deadline: float) -> bytearray:
        target = self._root.locate(object.id.key)
        check_range(object, range, target.uri)
        if range.length == 0 < object.size:
            return bytearray()  # HTTP has no empty ranges.
        download = Download(target, object, range, self._counters)

        clients = self._calls.clients

        def attempt(client: S3Client) -> None:
            download.attempt(client, clients.plain(client), lambda: clients.way_asked(target.key), deadline)

        try:
            self._calls.run(attempt, action="read", target=target, deadline=deadline)
        except ObjectChanged as error:
            self._require_change(object, target, error, deadline)
            raise
        return download.buffer

    def _require_change(
        self, object: ObjectInfo, target: S3Object, said: ObjectChanged, deadline: float
    ) -> None:
        """A change ends trainings, and storage was seen to answer 412 where it had trouble to look: it is asked again.

        Raises ServerUnavailable if the object is what it was, ObjectNotFound if it is gone.
        """
        try:
            now = self.stat(object.id.key, deadline=deadline)
        except ObjectNotFound:
            raise vanished(target.uri) from said
        except TransientError:
            raise  # nobody knows
        except TorchCacheError:
            raise said from None
        if (now.id.version, now.size) == (object.id.version, object.size):
            raise ServerUnavailable(
                f"{target.uri} was said to have changed, and has not: try again; if it stays so, the server "
                "doesn't take the ETags that it tells of in If-Match",
                object=target.uri,
            ) from said

    def write(
        self,
        key: str,
        parts: Iterator[memoryview],
        size: int,
        *,
        replaces: str | None,
        deadline: float,
    ) -> ObjectInfo:
        target = self._root.locate(key)
        etag = upload(self._calls, target, parts, size, replaces=replaces, deadline=deadline)
        return self._info(target, etag, size)

    def copy(
        self, source: ObjectInfo, key: str, *, replaces: str | None, deadline: float
    ) -> ObjectInfo | None:
        if time.monotonic() < self._copies_from_s:
            return None
        target = self._root.locate(key)
        begun_s = time.monotonic()
        etag = copy(
            self._calls,
            self._root.locate(source.id.key),
            source.id.version,
            target,
            source.size,
            replaces=replaces,
            deadline=deadline,
        )
        if etag is None and time.monotonic() - begun_s >= SLOW_REFUSAL_S:
            self._copies_from_s = time.monotonic() + NO_COPIES_S
        return None if etag is None else self._info(target, etag, source.size)

    def delete(self, key: str, *, deadline: float) -> None:
        target = self._root.locate(key)
        self._calls.run(
            lambda client: client.delete_object(Bucket=target.bucket, Key=target.key),
            action="delete",
            target=target,
            deadline=deadline,
        )

    def close(self) -> None:
        self._calls.clients.close()

    def _info(self, target: S3Object, etag: str, size: int) -> ObjectInfo:
        return ObjectInfo(ObjectId(self._name, self._root.relative(target), etag.strip('"')), size)

    def _without_bucket(self, target: S3Object, deadline: float) -> TorchCacheError | None:
        """A HEAD doesn't say whether key or bucket is missing: this does, if it can be found out."""
        try:
            self._calls.once(
                lambda client: client.head_bucket(Bucket=target.bucket),
                action="stat",
                target=target,
                deadline=deadline,
            )
        except ObjectNotFound:
            endpoint = self._calls.clients.endpoint(deadline)
            return no_such_bucket(target.uri, endpoint)
        except TorchCacheError:
            return None
        return None
