"""Objects of the under-stores through the pool: names, listings, and what is written or removed there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from torchcache.errors import ConfigurationError, DeadlineExceeded
from torchcache.lanes.base import Buffer
from torchcache.model import SAVE_PREFIX, ObjectId, ObjectInfo
from torchcache.placement import placement_key
from torchcache.pool.buffers import flat
from torchcache.pool.folder_listing import FolderListing, FolderPart
from torchcache.pool.members import UnderStoreName
from torchcache.pool.retry import Retry
from torchcache.pool.session import Session
from torchcache.pool.writes import Writing
from torchcache.save_names import put_namespace
from torchcache.wire.v1 import cache_pb2

CALL_S: Final = 30.0
LIST_S: Final = 60.0
PAGE_OBJECTS: Final = 1000
WRITE_CALL_S: Final = 60.0
PUBLISH_WAIT_S: Final = 10.0
"""How long one call waits for an upload before it is asked again."""

SLOW_BYTES_S: Final = 1_000_000
"""An upload slower than this, after `CALL_S` of grace, is given up."""


BY_NAME: Final = "torchcache://"
"""Begins a URI that names its under-store, as fsspec's protocol of that name does."""


def info_of(ref: cache_pb2.ObjectRef) -> ObjectInfo:
    """The object a reference names."""
    return ObjectInfo(ObjectId(ref.store, ref.key, ref.version), ref.size)


def split_uri(uri: str, stores: Sequence[UnderStoreName]) -> tuple[str, str]:
    """The (under-store name, key) of a URI: the under-store with the longest root that begins it.

    A local path without a scheme is taken as a file: URI, and `torchcache://<under-store>/<key>` as the fsspec file
    system has it. Raises ConfigurationError.
    """
    if uri.startswith(BY_NAME):
        return _split_named(uri, stores)
    full = "file://" + uri if uri.startswith("/") else uri
    # The root of an under-store is a URI too: of the folder that holds everything.
    fitting = [s for s in stores if full.startswith(s.root) or full + "/" == s.root]
    if not fitting:
        known = ", ".join(sorted(s.root for s in stores)) or "none"
        raise ConfigurationError(f"no under-store of the pool holds {uri!r}; it has: {known}", object=uri)
    best = max(fitting, key=lambda s: len(s.root))
    return best.name, full[len(best.root) :]


def _split_named(uri: str, stores: Sequence[UnderStoreName]) -> tuple[str, str]:
    name, _, key = uri.removeprefix(BY_NAME).partition("/")
    if name not in {s.name for s in stores}:
        known = ", ".join(sorted(s.name for s in stores)) or "none"
        raise ConfigurationError(
            f"{uri!r} should start with the name of an under-store, {BY_NAME}NAME/...; the pool has: {known}",
            object=uri,
        )
    return name, key


class Objects:
    """The calls on objects of one pool in one process."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def _stores(self) -> Sequence[UnderStoreName]:
        deadline = time.monotonic() + CALL_S
        members = self._session.first_members(Retry(self._session.budget, deadline), deadline)
        return next(iter(members.by_id.values())).under_stores

    def resolve(self, uri: str) -> tuple[str, str]:
        """See `Pool.resolve`."""
        return split_uri(uri, self._stores())

    def uri(self, id_: ObjectId) -> str:
        """See `Pool.uri`."""
        roots = {s.name: s.root for s in self._stores()}
        return roots[id_.store] + id_.key if id_.store in roots else f"{id_.store}/{id_.key}"

    def _object(self, uri: str) -> tuple[str, str]:
        store, key = self.resolve(uri)
        if not key or key.endswith("/"):
            raise ConfigurationError(f"{uri!r} names a folder, not an object", object=uri)
        return store, key

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """See `Pool.list`."""
        store, key = self.resolve(uri)
        return self._flat(store, key if not key or key.endswith("/") else key + "/")

    def _flat(self, store: str, prefix: str) -> Iterator[ObjectInfo]:
        after = ""
        while True:
            request = cache_pb2.ListRequest(store=store, prefix=prefix, start_after=after, limit=PAGE_OBJECTS)
            page = self._session.ask("ListObjects", request, key=prefix.encode(), timeout_s=LIST_S).reply
            yield from map(info_of, page.objects)
            if not page.truncated or not page.objects:
                return
            after = page.objects[-1].key

    def list_in_any_order(self, uri: str) -> Iterator[ObjectInfo]:
        """See `Pool.list_in_any_order`."""
        store, key = self.resolve(uri)
        folder = key if not key or key.endswith("/") else key + "/"
        if not folder:
            return self.list(uri)  # of buckets there is no listing
        return FolderListing(partial(self._folder, store), partial(self._flat, store)).objects(folder)

    def _folder(self, store: str, prefix: str, token: str, behind: str) -> FolderPart | None:
        request = cache_pb2.ListFolderRequest(store=store, prefix=prefix, token=token, start_after=behind)
        reply = self._session.ask("ListFolder", request, key=prefix.encode(), timeout_s=LIST_S).reply
        if not reply.supported:
            return None
        objects = [*map(info_of, reply.objects)]
        return FolderPart(objects, [*reply.folders], reply.token, behind=reply.starts_anywhere)

    def stat(self, uri: str) -> ObjectInfo:
        """See `Pool.stat`."""
        store, key = self._object(uri)
        request = cache_pb2.StatRequest(store=store, key=key)
        return info_of(self._session.ask("StatObject", request, key=key.encode(), timeout_s=CALL_S).reply)

    def delete(self, uri: str) -> None:
        """See `Pool.delete`."""
        store, key = self._object(uri)
        request = cache_pb2.DeleteRequest(store=store, key=key)
        self._session.ask("DeleteObject", request, key=key.encode(), timeout_s=CALL_S)

    def publish(self, uri: str, data: Sequence[Buffer], *, create_only: bool) -> ObjectInfo:
        """See `Pool.publish`."""
        store, key = self._object(uri)
        write_id = uuid.uuid4().hex
        id_ = ObjectId(store, key, SAVE_PREFIX + write_id)
        size = sum(len(flat(part)) for part in data)
        writing = Writing(self._session, put_namespace(id_), durable=False, timeout_s=WRITE_CALL_S)
        writing.run([(id_, data)])
        request = cache_pb2.PublishRequest(
            store=store, key=key, write_id=write_id, size=size, create_only=create_only, wait_s=PUBLISH_WAIT_S
        )
        deadline = time.monotonic() + CALL_S + size / SLOW_BYTES_S
        while True:
            reply = self._session.ask(
                "PublishObject",
                request,
                key=placement_key(id_, 0),
                timeout_s=CALL_S + PUBLISH_WAIT_S,
                only_owner=True,
            ).reply
            if reply.done:
                return info_of(reply.object)
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"{uri} was not written to the under-store in time; the upload may still finish",
                    object=uri,
                )
