"""What an S3 says of its objects, checked: a server that only looks like S3, or means harm, may say anything. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torchcache.errors import ConfigurationError
from torchcache_server.understore.s3_names import S3Object

MAX_OBJECT_BYTES: Final = 1 << 50
MAX_KEY_BYTES: Final = 4096
MAX_ETAG_CHARACTERS: Final = 1024


def listed(answer: Mapping[str, Any], target: S3Object, asked: int) -> list[tuple[S3Object, str, int]]:
    """Object, ETag and size of all in a page of at most `asked` that lies under `target`.

    Markers of folders (empty, with a slash at the end) are left out. Raises ConfigurationError.
    """
    entries = answer.get("Contents", [])
    if len(entries) > asked:
        raise nonsense(target, f"{len(entries)} objects where {asked} were asked for")
    found = [
        (_below(entry.get("Key"), target), *version_and_size(entry, "Size", target)) for entry in entries
    ]
    return [(place, etag, size) for place, etag, size in found if size or not place.key.endswith("/")]


def listed_folders(answer: Mapping[str, Any], target: S3Object, asked: int) -> list[S3Object]:
    """The folders in a page of at most `asked`. Raises ConfigurationError."""
    entries = answer.get("CommonPrefixes", [])
    if len(entries) > asked:
        raise nonsense(target, f"{len(entries)} folders where {asked} were asked for")
    return [_below(entry.get("Prefix"), target) for entry in entries]


def continuation(answer: Mapping[str, Any], target: S3Object) -> str:
    """What leads to the next page; empty if this was the last. Raises ConfigurationError."""
    if not answer.get("IsTruncated"):
        return ""
    token = answer.get("NextContinuationToken")
    if not isinstance(token, str) or not token:
        raise nonsense(target, "there is more, but not how to go on")
    return token


def version_and_size(answer: Mapping[str, Any], size_name: str, target: S3Object) -> tuple[str, int]:
    """ETag, without its quotes, and size of an object. Raises ConfigurationError."""
    etag, size = answer.get("ETag"), answer.get(size_name)
    version = etag.strip('"') if isinstance(etag, str) else ""
    if not 0 < len(version) <= MAX_ETAG_CHARACTERS:
        raise nonsense(target, "an object without an ETag, or with one of no use")
    if not isinstance(size, int) or not 0 <= size <= MAX_OBJECT_BYTES:
        raise nonsense(target, f"an object of {str(size)[:40]} bytes")
    return version, size


def nonsense(target: S3Object, what: str) -> ConfigurationError:
    """The error of an answer that no S3 gives."""
    return ConfigurationError(
        f"{target.uri}: the server answered what no S3 does, {what}; check AWS_ENDPOINT_URL",
        object=target.uri,
    )


def _below(key: object, target: S3Object) -> S3Object:
    if (
        not isinstance(key, str)
        or not key.startswith(target.key)
        or not 0 < len(key.encode()) <= MAX_KEY_BYTES
    ):
        raise nonsense(target, "a key that doesn't lie there")
    return S3Object(target.bucket, key)
