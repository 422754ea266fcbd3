"""The control calls on saves of checkpoints: a part of control.py. No decisions are made here."""

# ruff: noqa: N802 - gRPC calls the methods by the names in the proto file

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import grpc

from torchcache.wire.limits import MAX_INLINE_BYTES
from torchcache.wire.status import encode_error
from torchcache.wire.v1 import cache_pb2 as pb
from torchcache_server.cache.catalogue import HeldElsewhere
from torchcache_server.cache.write_back import SaveKey, SaveStatus, WriteBack
from torchcache_server.understore import UnderStore, choose

from .calls import deadline_of, remaining_s
from .requests import object_key, save_id, timeout, under_store_name

MAX_READER_CHARACTERS: Final = 200
MAX_REPLICAS: Final = 64

_STATES: Final = {
    "reserved": pb.SAVE_STATE_RESERVED,
    "committed": pb.SAVE_STATE_COMMITTED,
    "durable": pb.SAVE_STATE_DURABLE,
    "failed": pb.SAVE_STATE_FAILED,
}


class SaveCalls:
    """Translates. Whoever has it as a base sets the two."""

    _write_back: WriteBack
    _under_stores: Mapping[str, UnderStore]

    def ReserveSave(self, request: pb.ReserveSaveRequest, context: grpc.ServicerContext) -> pb.LeaseReply:
        lease_s = self._write_back.reserve(
            self._save_key(request.save),
            save_id(request.save.save_id),
            writer=request.writer,
            overwrite=request.overwrite,
            deadline=deadline_of(context),
        )
        replaceable = self._write_back.replaceable(self._save_key(request.save))
        return pb.LeaseReply(lease_s=lease_s, replaceable=replaceable)

    def RenewSave(self, request: pb.RenewSaveRequest, context: grpc.ServicerContext) -> pb.LeaseReply:
        return pb.LeaseReply(
            lease_s=self._write_back.renew(self._save_key(request.save), save_id(request.save.save_id))
        )

    def CommitSave(self, request: pb.CommitSaveRequest, context: grpc.ServicerContext) -> pb.SaveReply:
        status = self._write_back.commit(
            self._save_key(request.save),
            save_id(request.save.save_id),
            [(object_key(file.name), file.size) for file in request.files],
            request.metadata,
            request.manifest,
            replicas=min(max(1, request.replicas), MAX_REPLICAS),
            borrowed=_borrowed(request.files),
            deadline=deadline_of(context),
        )
        return save_reply(status)

    def BorrowFiles(
        self, request: pb.BorrowFilesRequest, context: grpc.ServicerContext
    ) -> pb.BorrowFilesReply:
        lent = self._write_back.lend(
            self._save_key(request.save),
            save_id(request.save.save_id),
            self._save_key(request.base),
            save_id(request.base.save_id),
            frozenset(object_key(name) for name in request.names),
            deadline=deadline_of(context),
        )
        return pb.BorrowFilesReply(names=lent)

    def ReturnFiles(
        self, request: pb.ReturnFilesRequest, context: grpc.ServicerContext
    ) -> pb.ReturnFilesReply:
        self._write_back.take_back(
            self._save_key(request.save),
            save_id(request.save.save_id),
            frozenset(request.names),
            deadline=deadline_of(context),
        )
        return pb.ReturnFilesReply()

    def PrepareCopy(
        self, request: pb.PrepareCopyRequest, context: grpc.ServicerContext
    ) -> pb.PrepareCopyReply:
        self._write_back.prepare_copy(
            self._save_key(request.save),
            save_id(request.save.save_id),
            [(object_key(file.name), file.size) for file in request.files],
            request.metadata,
            request.manifest,
            replaceable=list(request.replaceable),
            overwrite=request.overwrite,
            writer=request.writer,
            owner=request.owner,
            borrowed=_borrowed(request.files),
            committed_unix_s=min(max(0.0, request.committed_unix_s), time.time()),
            replicas=min(max(2, request.replicas), MAX_REPLICAS),
            deadline=deadline_of(context),
        )
        return pb.PrepareCopyReply()

    def ConfirmCopy(
        self, request: pb.ConfirmCopyRequest, context: grpc.ServicerContext
    ) -> pb.ConfirmCopyReply:
        self._write_back.confirm_copy(
            self._save_key(request.save),
            save_id(request.save.save_id),
            committed_unix_s=request.committed_unix_s,
            replicas=min(max(1, request.replicas), MAX_REPLICAS),
            deadline=deadline_of(context),
        )
        return pb.ConfirmCopyReply()

    def DropCopy(self, request: pb.DropCopyRequest, context: grpc.ServicerContext) -> pb.DropCopyReply:
        self._write_back.drop_copy(
            self._save_key(request.save),
            save_id(request.save.save_id) if request.save.save_id else "",
            deadline=deadline_of(context),
        )
        return pb.DropCopyReply()

    def AbandonSave(
        self, request: pb.AbandonSaveRequest, context: grpc.ServicerContext
    ) -> pb.AbandonSaveReply:
        self._write_back.abandon(self._save_key(request.save), save_id(request.save.save_id))
        return pb.AbandonSaveReply()

    def DeleteSave(self, request: pb.DeleteSaveRequest, context: grpc.ServicerContext) -> pb.DeleteSaveReply:
        done = self._write_back.delete(
            self._save_key(request.save),
            save_id(request.save.save_id) if request.save.save_id else "",
            deadline=deadline_of(context),
            wait_s=min(timeout(request.wait_s), remaining_s(context)),
        )
        return pb.DeleteSaveReply(done=done)

    def HoldSave(self, request: pb.HoldSaveRequest, context: grpc.ServicerContext) -> pb.LeaseReply:
        key, reader_id = self._save_key(request.save), save_id(request.reader_id)
        if request.release:
            self._write_back.release(key, reader_id)
            return pb.LeaseReply()
        lease_s = self._write_back.hold(
            key, save_id(request.save.save_id), reader_id, request.reader[:MAX_READER_CHARACTERS]
        )
        return pb.LeaseReply(lease_s=lease_s)

    def GetSave(self, request: pb.GetSaveRequest, context: grpc.ServicerContext) -> pb.SaveReply:
        key = self._save_key(pb.SaveRef(store=request.store, path=request.path, part=request.part))
        deadline = deadline_of(context)
        try:
            status = self._write_back.get(key, deadline=deadline, check_claim=request.check_claim)
        except HeldElsewhere as error:
            return pb.SaveReply(holder=error.holder, later_save_id=error.save_id)
        return save_reply(status, manifest=not request.without_manifest)

    def ListSaves(self, request: pb.ListSavesRequest, context: grpc.ServicerContext) -> pb.ListSavesReply:
        self._under_store(request.store)
        found = self._write_back.list(request.store, request.prefix, deadline=deadline_of(context))
        brief = (replace(status, borrowed={}) for status in found)
        return pb.ListSavesReply(saves=[save_reply(status, manifest=False) for status in brief])

    def _under_store(self, name: str) -> UnderStore:
        return choose(self._under_stores, under_store_name(name))

    def _save_key(self, ref: pb.SaveRef) -> SaveKey:
        self._under_store(ref.store)
        return SaveKey(ref.store, object_key(ref.path), ref.part)


def _borrowed(files: Iterable[pb.SavedFile]) -> frozenset[str]:
    return frozenset(file.name for file in files if file.borrowed)


def save_reply(status: SaveStatus, *, manifest: bool = True) -> pb.SaveReply:
    """A save's status on the wire."""
    key = status.key
    return pb.SaveReply(
        save=pb.SaveRef(store=key.store, path=key.path, part=key.part, save_id=status.save_id),
        state=_STATES[status.state],
        manifest=status.manifest if manifest and len(status.manifest) <= MAX_INLINE_BYTES else b"",
        pending_bytes=status.pending_bytes,
        total_bytes=status.total_bytes,
        error=encode_error(status.error) if status.error else "",
        committed_unix_s=status.committed_unix_s,
        durable_unix_s=status.durable_unix_s,
        replicas=status.replicas,
        superseded=status.superseded,
        later_save_id=status.later_save_id,
        uncertain=status.uncertain,
        borrowed=[
            pb.BorrowedFile(name=name, path=path, save_id=id) for name, (path, id) in status.borrowed.items()
        ],
    )
