"""Saves of checkpoints, as a client drives them. The protocol stands beside the messages in wire/v1/cache.proto."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from torchcache.errors import (
    DeadlineExceeded,
    IntegrityError,
    NotCommitted,
    NotResident,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.lanes.base import ReadOptions
from torchcache.model import SAVE_PREFIX, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.placement import placement_key
from torchcache.pool.members import Member, Members
from torchcache.pool.objects import Objects
from torchcache.pool.reads import Reading
from torchcache.pool.replicas import Replicas, holders, replicas_wanted
from torchcache.pool.reports import Reservation, SaveInfo, SaveState
from torchcache.pool.retry import Retry
from torchcache.pool.session import Asked, Session
from torchcache.pool.writes import Writing
from torchcache.save_names import (
    MANIFEST_NAME,
    METADATA_NAME,
    MOST_MANIFEST_BYTES,
    save_namespace,
    saved_file,
)
from torchcache.threads import Threads
from torchcache.wire.limits import MAX_INLINE_BYTES
from torchcache.wire.status import decode_error
from torchcache.wire.v1 import cache_pb2

_log = logging.getLogger(__name__)

CALL_S: Final = 60.0
"""A reservation may wait for another's lease to run out."""

RESERVE_S: Final = 300.0
"""A save waits for so long until uploads of earlier ones have made room."""

VERIFIED_BYTES_S: Final = 100e6
"""A server that is asked to lend files reads them first, at least so fast."""
BORROW_AGAIN_S: Final = 0.2
GIVE_BACK_S: Final = 10.0

HOLD_S: Final = 10.0
DELETE_WAIT_S: Final = 20.0
"""How long one call waits for a deletion before it is asked again."""

_STATES: Final[dict[int, SaveState]] = {
    cache_pb2.SAVE_STATE_RESERVED: "reserved",
    cache_pb2.SAVE_STATE_COMMITTED: "committed",
    cache_pb2.SAVE_STATE_DURABLE: "durable",
    cache_pb2.SAVE_STATE_FAILED: "failed",
}


def save_info(reply: Any, server: str, server_id: str = "") -> SaveInfo:
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
        replicas=max(1, reply.replicas),
        server=server_id,
        borrowed={file.name: (file.path, file.save_id) for file in reply.borrowed},
    )


def _info(asked: Asked) -> SaveInfo:
    return save_info(asked.reply, asked.member.address, asked.member.server_id)


def folder_key(store: str, path: str) -> bytes:
    """The placement key of all files of a save at `path`."""
    return placement_key(ObjectId(store, f"{path}/", SAVE_PREFIX), 0)


def _namespace(ref: cache_pb2.SaveRef) -> str:
    return save_namespace(ref.store, ref.path, ref.save_id)


def _file(ref: cache_pb2.SaveRef, name: str) -> ObjectId:
    return saved_file(ref.store, ref.path, name, ref.save_id)


class Saves:
    """The calls on saves of one pool in one process.

    A save is reserved at the owner of its folder, or the first server behind it that can be reached; the reservation
    says which, and all further calls of its writer go there.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def _ask(
        self, method: str, request: Any, ref: Any, timeout_s: float = CALL_S, *, server: str = ""
    ) -> Asked:
        key = folder_key(ref.store, ref.path)
        return self._session.ask(
            method, request, key=key, timeout_s=timeout_s, only_owner=True, server=server
        )

    def reserve(
        self,
        ref: cache_pb2.SaveRef,
        *,
        overwrite: bool,
        writer: str,
        replicas: int | None,
        near: Sequence[str] = (),
    ) -> Reservation:
        """See `Pool.reserve_save`."""
        deadline = time.monotonic() + CALL_S
        members = self._session.first_members(Retry(self._session.budget, deadline), deadline)
        wanted = replicas_wanted(replicas, members, embedded=self._session.source.embedded)
        key = folder_key(ref.store, ref.path)
        request = cache_pb2.ReserveSaveRequest(save=ref, overwrite=overwrite, writer=writer)
        asked = self._reserve_at(near[0], members, request) if near else None
        if asked is None:
            asked = self._session.ask("ReserveSave", request, key=key, timeout_s=RESERVE_S)
        return Reservation(
            lease_s=asked.reply.lease_s,
            servers=holders(self._session, key, asked.member.server_id, wanted, near=near),
            wanted=wanted,
            writer=writer,
            overwrite=overwrite,
            replaceable=tuple(asked.reply.replaceable),
        )

    def _reserve_at(self, server: str, members: Members, request: Any) -> Asked | None:
        """At a server that isn't the owner; None if it can't be reached: nothing is lost but what it could lend."""
        member = members.by_id.get(server)
        if member is None or self._session.health.is_out(server):
            return None
        try:
            return self._session.ask_member(member, "ReserveSave", request, time.monotonic() + CALL_S)
        except TransientError as error:
            _log.info("%s is reserved elsewhere than the save before: %s", request.save.path, error)
            return None

    def borrow(
        self,
        ref: cache_pb2.SaveRef,
        base: cache_pb2.SaveRef,
        sizes: Mapping[str, int],
        servers: Sequence[str],
    ) -> frozenset[str]:
        """See `Pool.borrow_files`."""
        members = self._session.current
        if members is None or not servers:
            return frozenset()
        request = cache_pb2.BorrowFilesRequest(save=ref, base=base, names=sorted(sizes))
        deadline = time.monotonic() + CALL_S + sum(sizes.values()) / VERIFIED_BYTES_S

        def ask(server: str) -> frozenset[str]:
            while True:
                try:
                    asked = self._session.ask_member(members.known(server), "BorrowFiles", request, deadline)
                except Overloaded as error:  # by other ranks
                    if time.monotonic() < deadline:
                        time.sleep(BORROW_AGAIN_S)
                        continue
                    failure: TorchCacheError = error
                except TorchCacheError as error:
                    failure = error
                else:
                    return frozenset(asked.reply.names)
                _log.info("nothing is borrowed for %s from %s: %s", ref.path, server, failure)
                return frozenset()

        with Threads(len(servers), name="torchcache-borrow") as threads:
            asked = [(server, threads.submit(ask, server)) for server in servers]
            lent = {server: one.result() for server, one in asked}
        borrowed = frozenset(sizes).intersection(*lent.values())
        for server, names in lent.items():
            self.give_back(ref, names - borrowed, [server])
        return borrowed

    def give_back(self, ref: cache_pb2.SaveRef, names: Collection[str], servers: Sequence[str]) -> None:
        """See `Pool.return_files`."""
        members = self._session.current
        if members is None or not names:
            return
        request = cache_pb2.ReturnFilesRequest(save=ref, names=sorted(names))
        for server in servers:
            try:
                deadline = time.monotonic() + GIVE_BACK_S
                self._session.ask_member(members.known(server), "ReturnFiles", request, deadline)
            except TorchCacheError as error:
                _log.info("%s keeps what it has lent to %s for now: %s", server, ref.path, error)

    def renew(self, ref: cache_pb2.SaveRef, server: str) -> float:
        """See `Pool.renew_save`."""
        asked = self._ask("RenewSave", cache_pb2.RenewSaveRequest(save=ref), ref, server=server)
        return float(asked.reply.lease_s)

    def commit(
        self,
        ref: cache_pb2.SaveRef,
        *,
        files: Sequence[tuple[str, int]],
        borrowed: Collection[str],
        metadata: bytes,
        manifest: bytes,
        timeout_s: float,
        reservation: Reservation | None,
    ) -> SaveInfo:
        """See `Pool.commit_save`."""
        servers = reservation.servers if reservation is not None else ()
        if len(metadata) + len(manifest) > MAX_INLINE_BYTES:
            described = [(f"{ref.part}{METADATA_NAME}", metadata), (f"{ref.part}{MANIFEST_NAME}", manifest)]
            Writing(self._session, _namespace(ref), durable=True, timeout_s=timeout_s, servers=servers).run(
                [(_file(ref, name), [data]) for name, data in described]
            )
            metadata = manifest = b""
        request = cache_pb2.CommitSaveRequest(
            save=ref,
            files=[
                cache_pb2.SavedFile(name=name, size=size, borrowed=name in borrowed) for name, size in files
            ],
            metadata=metadata,
            manifest=manifest,
        )
        if reservation is None:
            asked = self._ask("CommitSave", request, ref, timeout_s)
            return _info(asked)
        return self._commit_with_copies(ref, request, reservation, timeout_s)

    def _commit_with_copies(
        self, ref: cache_pb2.SaveRef, request: Any, of: Reservation, timeout_s: float
    ) -> SaveInfo:
        """The others hold it before the first commits it: what is committed has as many copies as its state says."""
        copies = Replicas(self._session, ref, of.servers[1:])
        copies.prepare(request, of, timeout_s)
        request.replicas = 1 + len(copies.servers)
        try:
            asked = self._ask("CommitSave", request, ref, timeout_s, server=of.servers[0])
        except TransientError:
            raise  # it may have arrived
        except TorchCacheError:
            copies.drop()
            raise
        self._session.forget_copies(_namespace(ref))
        info = _info(asked)
        copies.confirm(info.committed_unix_s)
        if info.replicas < of.wanted:
            _log.warning(
                "%s is safe on %d server%s of the pool, not on %d, until it is uploaded: the others could not be "
                "reached, or have no room",
                *(ref.path, info.replicas, "s" if info.replicas > 1 else "", of.wanted),
            )
        return info

    def abandon(self, ref: cache_pb2.SaveRef, servers: Sequence[str]) -> None:
        """See `Pool.abandon_save`."""
        first = servers[0] if servers else ""
        try:
            self._ask("AbandonSave", cache_pb2.AbandonSaveRequest(save=ref), ref, server=first)
        finally:
            self._session.forget_copies(_namespace(ref))
            Replicas(self._session, ref, servers[1:]).drop()

    def delete(self, ref: cache_pb2.SaveRef, *, timeout_s: float) -> None:
        """See `Pool.delete_save`."""
        deadline = time.monotonic() + timeout_s
        begun = False
        server, others, save_id = self._where(ref)
        while True:
            try:
                # Once it is noted, readers are told nothing of the save any more: nor shall they be by the copies.
                most_s = DELETE_WAIT_S if begun or not others else 0.0
                wait_s = max(0.001, min(most_s, deadline - time.monotonic()))
                request = cache_pb2.DeleteSaveRequest(save=ref, wait_s=wait_s)
                done = self._ask("DeleteSave", request, ref, server=server).reply.done
            except NotCommitted:
                if begun:  # by an answer that was lost, or while this one asked again
                    return
                raise
            if not begun:
                self._drop_copies(ref, others, save_id)
            if done:
                return
            begun = True
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"the checkpoint at {ref.path} is gone for readers, but not all of its files are yet; the pool "
                    "goes on deleting them",
                    object=ref.path,
                )

    def _drop_copies(self, ref: cache_pb2.SaveRef, servers: Sequence[str], save_id: str) -> None:
        """Whichever was committed; and by its id one that came late, of which its server doesn't know that it was."""
        Replicas(self._session, ref, servers).drop()
        if save_id and not ref.save_id:
            found = cache_pb2.SaveRef(store=ref.store, path=ref.path, part=ref.part, save_id=save_id)
            Replicas(self._session, found, servers).drop()

    def _where(self, ref: cache_pb2.SaveRef) -> tuple[str, list[str], str]:
        """The server that has the save at the path ("": the owner, if none says so), all others, and the save's id."""
        deadline = time.monotonic() + CALL_S
        members = self._session.first_members(Retry(self._session.budget, deadline), deadline)
        if len(members.by_id) == 1:
            return "", [], ""
        try:
            found = self._get(ref.store, ref.path, ref.part, manifest=False)
            server, save_id = found.server, found.save_id
        except NotCommitted:
            server, save_id = self._session.ordering.owner(folder_key(ref.store, ref.path), members), ""
        return server, [other for other in members.by_id if other != server], save_id

    def hold(
        self, ref: cache_pb2.SaveRef, reader_id: str, reader: str, *, release: bool, server: str
    ) -> float:
        """See `Pool.hold_save`. Tells the path's owner too: what is durable is deleted there, whoever has it."""
        request = cache_pb2.HoldSaveRequest(save=ref, reader_id=reader_id, reader=reader, release=release)
        lease_s = float(self._ask("HoldSave", request, ref, HOLD_S, server=server).reply.lease_s)
        members = self._session.current
        if server and members is not None:
            owner = self._session.ordering.owner(folder_key(ref.store, ref.path), members)
            if owner != server:
                self._hold_at(members.known(owner), request)
        return lease_s

    def _hold_at(self, member: Member, request: Any) -> None:
        try:
            self._session.ask_member(member, "HoldSave", request, time.monotonic() + HOLD_S)
        except TransientError as error:
            _log.info("%s doesn't know who reads %s: %s", member.address, request.save.path, error)

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
        file = objects.stat(uri)
        if file.size > MOST_MANIFEST_BYTES:
            raise IntegrityError(
                f"{uri} has {file.size:,} bytes, and of a manifest at most {MOST_MANIFEST_BYTES:,} are read: it isn't "
                "what was saved; load an older checkpoint",
                object=uri,
            )
        return self._content(file, uri.rpartition("/")[0])

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
        """What the first server says that knows of the save.

        A server that was away may know of one that another has replaced since, and says so; where it can't know that,
        the others are asked too. Absent means that who may have it was asked: the others know who that is, by the claim
        in the under-store.
        """
        failure: TorchCacheError | None = None
        superseded: SaveInfo | None = None
        answered: set[str] = set()
        holders: set[str] = set()
        later: set[str] = set()
        request.check_claim = len(members.by_id) > 1 or bool(members.missing)
        order = self._session.ordering.order(folder_key(request.store, request.path), members)
        for turn, server in enumerate(order):
            try:
                asked = self._session.ask_member(members.by_id[server], "GetSave", request, deadline)
            except NotCommitted:
                answered.add(server)
                continue
            except TransientError as error:
                failure = error
                continue
            answered.add(server)
            later.add(asked.reply.later_save_id)
            if asked.reply.holder:
                holders.add(asked.reply.holder)
            elif asked.reply.superseded:
                superseded = superseded or _info(asked)
            elif asked.reply.uncertain:
                rest = [members.by_id[other] for other in order[turn + 1 :]]
                return self._latest(request, asked, rest, deadline, replaced=superseded)
            else:
                return _info(asked)
        if len(later - {""}) > 1:
            # Each was asked at another time: the save that one told of was replaced before its holder's turn came.
            raise ServerUnavailable(
                f"{request.path} is saved to again and again just now, and no server had the last when it was asked",
                object=request.path,
            )
        if superseded is not None:
            if failure is not None:
                raise failure
            _log.warning("a later save of %s is committed, but no server has it any more", request.path)
            return superseded
        unasked = sorted(holders - answered)
        if isinstance(failure, ServerUnavailable) and answered:
            failure = None  # those that answered know whether it matters
        if failure is None and unasked:
            failure = ServerUnavailable(
                f"a checkpoint at {request.path} may be on the server {unasked[0]} alone, which can't be reached",
                object=request.path,
            )
        raise failure or NotCommitted(
            f"there is no committed checkpoint at {request.path}", object=request.path
        )

    def _latest(
        self,
        request: Any,
        first: Asked,
        others: Sequence[Member],
        deadline: float,
        *,
        replaced: SaveInfo | None,
    ) -> SaveInfo:
        """What a server says that knows there is nothing later; if none does, what all say.

        Of a save that one of them knows to be `replaced` the others need not know that. Raises ServerUnavailable where
        they say different ones: when each was committed, its server's clock says, and clocks are wrong at times.
        """

        def ask(other: Member) -> Asked | None:
            try:
                return self._session.ask_member(other, "GetSave", request, deadline)
            except (NotCommitted, TransientError):
                return None

        answers = [first]
        if others:
            with Threads(len(others), name="torchcache-saves") as threads:
                asked = [threads.submit(ask, other) for other in others]
                answers += [answer for one in asked if (answer := one.result()) is not None]
        gone = {one.reply.save.save_id for one in answers if one.reply.superseded}
        if replaced is not None:
            gone.add(replaced.save_id)
        told = [one for one in answers if not one.reply.holder and one.reply.save.save_id not in gone]
        if not told:
            raise ServerUnavailable(
                f"a later checkpoint at {request.path} is on a server that can't be reached",
                object=request.path,
            )
        certain = [one for one in told if not one.reply.uncertain]
        saves = {one.reply.save.save_id for one in certain or told}
        if len(saves) > 1:
            raise ServerUnavailable(
                f"which of {len(saves)} checkpoints at {request.path} is the last no server can know, while storage "
                "doesn't answer or another is being saved",
                object=request.path,
            )
        return _info(max(certain or told, key=lambda one: float(one.reply.committed_unix_s)))

    def list(self, store: str, prefix: str) -> Iterator[SaveInfo]:
        """See `Pool.list_saves`: by path and part, what the server with the latest commit says."""
        request = cache_pb2.ListSavesRequest(store=store, prefix=prefix)
        latest: dict[tuple[str, str], SaveInfo] = {}
        failures: list[TransientError] = []

        def without(member: Member, error: TransientError) -> None:
            _log.warning("saves that only %s holds aren't listed: %s", member.address, error)
            failures.append(error)

        answered = False
        for asked in self._session.ask_each("ListSaves", request, timeout_s=CALL_S, without=without):
            answered = True
            for reply in asked.reply.saves:
                info = save_info(reply, asked.member.address, asked.member.server_id)
                known = latest.get((info.path, info.part))
                latest[info.path, info.part] = info if known is None else _further(known, info)
        if failures and not answered:
            raise failures[0]
        return iter([latest[key] for key in sorted(latest)])


def _further(a: SaveInfo, b: SaveInfo) -> SaveInfo:
    """Of what two servers say of a path: the later save; of the same one, how far it has come."""
    if a.save_id == b.save_id:
        return b if b.state == "durable" else a
    return b if b.committed_unix_s > a.committed_unix_s else a
