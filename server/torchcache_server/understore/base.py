"""The contract of an under-store: the source of truth behind the cache.

Keys are relative to the under-store's URI. A version names one immutable state of a key; `read` delivers bytes of
that version or fails. Implementations are thread-safe, hold no state but counters and connections, retry what is worth
retrying within the deadline, and raise only errors of `torchcache.errors`, naming the object's URI.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from torchcache.errors import ConfigurationError, ObjectChanged
from torchcache.model import ByteRange, ObjectInfo

RequestKind = Literal["read", "write", "meta"]


@dataclass
class Counters:
    """What went to an under-store since start. A request that was retried counts once for every try."""

    read_requests: int = 0
    read_bytes: int = 0
    write_requests: int = 0
    write_bytes: int = 0
    meta_requests: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, kind: RequestKind, *, requests: int = 1, bytes: int = 0) -> None:
        """Counts `requests` tries, and a payload of `bytes`."""
        with self._lock:
            if kind == "read":
                self.read_requests += requests
                self.read_bytes += bytes
            elif kind == "write":
                self.write_requests += requests
                self.write_bytes += bytes
            else:
                self.meta_requests += requests

    def add_retry(self) -> None:
        """Counts one try that repeats a failed one; `add` counts the try itself."""
        with self._lock:
            self.retries += 1


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of objects; `truncated` if more follow behind the last key.

    The order is the under-store's own: bytewise by key from POSIX and AWS, folder by folder from SeaweedFS (where
    "a/x" comes before "a-b"). Whoever needs bytewise order sorts what all pages gave.
    """

    objects: Sequence[ObjectInfo]
    truncated: bool


@dataclass(frozen=True, slots=True)
class FolderPage:
    """A part of what lies right under a folder. `folders` are prefixes; a `token` leads to the next part."""

    objects: Sequence[ObjectInfo]
    folders: Sequence[str]
    token: str


_USER: Final = re.compile(r"://[^/@:]*:.*@", re.DOTALL)


def shown_uri(uri: str) -> str:
    """For messages: what others take for credentials, "scheme://key:secret@", is left out."""
    return _USER.sub("://[hidden]@", uri)


def object_uri(root: str, key: str) -> str:
    """The URI of `key` in the under-store whose URI is `root`."""
    return f"{root}{key}" if root.endswith("/") else f"{root}/{key}"


def check_key(key: str, uri: str) -> None:
    """Refuses keys that are empty, or that some server or kernel could read as a way out of the root.

    Raises ConfigurationError.
    """
    if not key:
        raise ConfigurationError(f"{uri} names no object: give the key of one")
    if "\0" in key or any(segment in (".", "..") for segment in key.split("/")):
        raise ConfigurationError(
            f'the key of {uri!r} has a "." or ".." segment or a NUL: no object is named so'
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"the key of {uri!r} is not valid Unicode: no object is named so") from None


def check_range(object: ObjectInfo, range: ByteRange, uri: str) -> None:
    """Raises ConfigurationError unless `range` lies within the object, which is at `uri`."""
    if not 0 <= range.start <= range.end <= object.size:
        raise ConfigurationError(f"{uri} has {object.size} bytes, not {range}", object=uri)


def changed(uri: str) -> ObjectChanged:
    """The error of a read whose version isn't there any more."""
    return ObjectChanged(
        f"{uri} was overwritten since it was listed; create the dataset again to use the new version",
        object=uri,
    )


class UnderStore(Protocol):
    """One named source of truth. `deadline` is a time.monotonic() value."""

    @property
    def name(self) -> str: ...

    @property
    def uri(self) -> str:
        """Root of the keys, e.g. "s3://", "s3://bucket/prefix", "file:///data". A URI is root + "/" + key."""

    @property
    def counters(self) -> Counters: ...

    def list(self, prefix: str, *, start_after: str, limit: int, deadline: float) -> Listing:
        """Objects whose key starts with `prefix`, behind `start_after` (empty: from the first).

        Raises ObjectNotFound if the bucket or folder itself doesn't exist; nothing under a prefix is an empty page.
        """

    def list_folder(
        self, prefix: str, *, token: str, deadline: float, start_after: str = ""
    ) -> FolderPage | None:
        """What lies right under `prefix`, which ends in a slash, behind `token` (empty: from the first).

        Without a token, and with a key to `start_after`, which lies under `prefix`: the objects behind that; of the
        folders some before it may come too.

        None where folders listed side by side are no faster than `list`. Raises as `list`.
        """

    def stat(self, key: str, *, deadline: float) -> ObjectInfo:
        """The object's current version and size. Raises ObjectNotFound."""

    def read(self, object: ObjectInfo, range: ByteRange, *, deadline: float) -> bytearray:
        """Exactly the bytes of `range` of `object` at its version, length and transport checksum verified.

        Raises ObjectChanged if the key holds another version now, ObjectNotFound if nothing, IntegrityError if the
        bytes keep arriving damaged.
        """

    def write(
        self,
        key: str,
        parts: Iterator[memoryview],
        size: int,
        *,
        replaces: str | None,
        deadline: float,
    ) -> ObjectInfo:
        """Stores `size` bytes as `key`, atomically and conditionally; returns the new version.

        `replaces` is the version that must be there now; "" means nothing may be there; None means whatever is there.
        Raises AlreadyExists if the condition doesn't hold. When in doubt after a lost answer, finds out by stat
        whether its own bytes are there.
        """

    def copy(
        self, source: ObjectInfo, key: str, *, replaces: str | None, deadline: float
    ) -> ObjectInfo | None:
        """As `write`, of the bytes of `source`, at its version, without their coming here.

        None where that can't be had, or where the source isn't at that version any more: then they are to be written.
        """

    def delete(self, key: str, *, deadline: float) -> None:
        """Removes `key`; absent is fine."""

    def close(self) -> None: ...
