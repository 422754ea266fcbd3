"""Saves of checkpoints, as a client drives them. The protocol stands beside the messages in wire/v1/cache.proto."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from torchcache.errors import DeadlineExceeded, NotCommitted, NotResident, TorchCacheError, TransientError
from torchcache.lanes.base import ReadOptions
from torchcache.model import SAVE_PREFIX, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.placement import placement_key
from torchcache.pool.members import Members
from torchcache.pool.objects import Objects
from torchcache.pool.reads import Reading
from torchcache.pool.reports import SaveInfo, SaveState
from torchcache.pool.retry import Retry
from torchcache.pool.session import Asked, Session
from torchcache.pool.writes import Writing
from torchcache.save_names import MANIFEST_NAME, METADATA_NAME, save_namespace, saved_file
from torchcache.wire.limits import MAX_INLINE_BYTES
from torchcache.wire.status import decode_error
from torchcache.wire.v1 import cache_pb2

CALL_S: Final = 60.0
"""A reservation may wait for another's lease to run out."""

HOLD_S: Final = 10.0
DELETE_WAIT_S: Final = 20.0
"""How long one call waits for a deletion before it is asked again."""

_STATES: Final[dict[int, SaveState]] = {
    cache_pb2.SAVE_STATE_RESERVED: "reserved",
    cache_pb2.SAVE_STATE_COMMITTED: "committed",
    cache_pb2.SAVE_STATE_DURABLE: "durable",
    cache_pb2.SAVE_STATE_FAILED: "failed",
}


def save_info(reply: Any, server: str) -> SaveInfo:
    """The save a SaveReply tells of."""
    return SaveInfo(
        store=reply.save.store,
        path=reply.save.path,
        part=reply.save.part,
        save_id=reply.save.save_id,
        state=_STATES.get(reply.state, "failed"),
        manifest=reply.manifest,
        pending_bytes=reply.pending_bytes,
        total_bytes=reply.total_bytes,
        error=decode_error(reply.error, server=server) if reply.error else None,
        committed_unix_s=reply.committed_unix_s,
        durable_unix_s=reply.durable_unix_s,
    )


def folder_key(store: str, path: str) -> bytes:
    """The placement key of all files of a save at `path`."""
    return placement_key(ObjectId(store, f"{path}/", SAVE_PREFIX), 0)


def _namespace(ref: cache_pb2.SaveRef) -> str:
    return save_namespace(ref.store, ref.path, ref.save_id)


def _file(ref: cache_pb2.SaveRef, name: str) -> ObjectId:
    return saved_file(ref.store, ref.path, name, ref.save_id)


class Saves:
    """The calls on saves of one pool in one process. All go to the owner of the save's folder."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def _ask(self, method: str, request: Any, ref: Any, timeout_s: float = CALL_S) -> Asked:
        key = folder_key(ref.store, ref.path)
        return self._session.ask(method, request, key=key, timeout_s=timeout_s, only_owner=True)

    def reserve(self, ref: cache_pb2.SaveRef, *, overwrite: bool, writer: str) -> float:
        """See `Pool.reserve_save`."""
        request = cache_pb2.ReserveSaveRequest(save=ref, overwrite=overwrite, writer=writer)
        return float(self._ask("ReserveSave", request, ref).reply.lease_s)

    def renew(self, ref: cache_pb2.SaveRef) -> float:
        """See `Pool.renew_save`."""
        return float(self._ask("RenewSave", cache_pb2.RenewSaveRequest(save=ref), ref).reply.lease_s)

    def commit(
        self,
        ref: cache_pb2.SaveRef,
        *,
        files: Sequence[tuple[str, int]],
        metadata: bytes,
        manifest: bytes,
        timeout_s: float,
    ) -> SaveInfo:
        """See `Pool.commit_save`."""
        if len(metadata) + len(manifest) > MAX_INLINE_BYTES:
            described = [(f"{ref.part}{METADATA_NAME}", metadata), (f"{ref.part}{MANIFEST_NAME}", manifest)]
            Writing(self._session, _namespace(ref), durable=True, timeout_s=timeout_s).run(
                [(_file(ref, name), [data]) for name, data in described]
            )
            metadata = manifest = b""
        request = cache_pb2.CommitSaveRequest(
            save=ref,
            files=[cache_pb2.SavedFile(name=name, size=size) for name, size in files],
            metadata=metadata,
            manifest=manifest,
        )
        asked = self._ask("CommitSave", request, ref, timeout_s)
        return save_info(asked.reply, asked.member.address)

    def abandon(self, ref: cache_pb2.SaveRef) -> None:
        """See `Pool.abandon_save`."""
        self._ask("AbandonSave", cache_pb2.AbandonSaveRequest(save=ref), ref)

    def delete(self, ref: cache_pb2.SaveRef, *, timeout_s: float) -> None:
        """See `Pool.delete_save`."""
        deadline = time.monotonic() + timeout_s
        begun = False
        while True:
            try:
                wait_s = max(0.001, min(DELETE_WAIT_S, deadline - time.monotonic()))
                request = cache_pb2.DeleteSaveRequest(save=ref, wait_s=wait_s)
                done = self._ask("DeleteSave", request, ref).reply.done
            except NotCommitted:
                if begun:  # by an answer that was lost, or while this one asked again
                    return
                raise
            if done:
                return
            begun = True
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"the checkpoint at {ref.path} is gone for readers, but not all of its files are yet; the pool "
                    "goes on deleting them",
                    object=ref.path,
                )

    def hold(self, ref: cache_pb2.SaveRef, reader_id: str, reader: str, *, release: bool) -> float:
        """See `Pool.hold_save`."""
        request = cache_pb2.HoldSaveRequest(save=ref, reader_id=reader_id, reader=reader, release=release)
        return float(self._ask("HoldSave", request, ref, HOLD_S).reply.lease_s)

    def get(self, store: str, path: str, part: str, *, manifest: bool) -> SaveInfo:
        """See `Pool.get_save`."""
        info = self._get(store, path, part, manifest=manifest)
        return replace(info, manifest=self._large_manifest(info)) if manifest and not info.manifest else info

    def _large_manifest(self, info: SaveInfo) -> bytes:
        """A manifest that doesn't fit a message: the pool's copy of it, else what lies in the under-store."""
        ref = cache_pb2.SaveRef(store=info.store, path=info.path, part=info.part, save_id=info.save_id)
        copy = _file(ref, f"{info.part}{MANIFEST_NAME}")
        try:
            return self._content(ObjectInfo(copy, UNKNOWN_SIZE), _namespace(ref))
        except NotResident:
            if info.state != "durable":
                raise
        objects = Objects(self._session)
        uri = objects.uri(ObjectId(info.store, copy.key, ""))
        return self._content(objects.stat(uri), uri.rpartition("/")[0])

    def _content(self, object: ObjectInfo, namespace: str) -> bytes:
        deadline = time.monotonic() + CALL_S
        options = ReadOptions(namespace=namespace)
        (outcome,) = Reading(self._session, [Extent(object)], None, options, deadline).run()
        if isinstance(outcome, TorchCacheError):
            raise outcome
        return bytes(outcome)

    def _get(self, store: str, path: str, part: str, *, manifest: bool) -> SaveInfo:
        request = cache_pb2.GetSaveRequest(store=store, path=path, part=part, without_manifest=not manifest)
        deadline = time.monotonic() + CALL_S
        retry = Retry(self._session.budget, deadline)
        while True:
            members = self._session.first_members(retry, deadline)
            try:
                return self._first(request, members, deadline)
            except TransientError as error:
                if not self._session.wait(retry, error, members, deadline):
                    raise

    def _first(self, request: Any, members: Members, deadline: float) -> SaveInfo:
        """What the first server says that knows of a save. Absent means that every server was asked."""
        failure: TorchCacheError | None = None
        absent: TorchCacheError | None = None
        for server in self._session.ordering.order(folder_key(request.store, request.path), members):
            try:
                asked = self._session.ask_member(members.by_id[server], "GetSave", request, deadline)
                return save_info(asked.reply, asked.member.address)
            except NotCommitted as error:
                absent = error
            except TransientError as error:
                failure = error
        raise failure or absent or NotCommitted(f"there is no checkpoint at {request.path}")

    def list(self, store: str, prefix: str) -> Iterator[SaveInfo]:
        """See `Pool.list_saves`: by path and part, what the server with the latest commit says."""
        request = cache_pb2.ListSavesRequest(store=store, prefix=prefix)
        latest: dict[tuple[str, str], SaveInfo] = {}
        for asked in self._session.ask_each("ListSaves", request, timeout_s=CALL_S):
            for reply in asked.reply.saves:
                info = save_info(reply, asked.member.address)
                known = latest.get((info.path, info.part))
                if known is None or info.committed_unix_s > known.committed_unix_s:
                    latest[info.path, info.part] = info
        return iter([latest[key] for key in sorted(latest)])
