"""The other servers of the pool, as a server that has something to ask of them meets them: by a client's own means."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final

import pyarrow as pa

from torchcache import environment
from torchcache.errors import ConfigurationError, ServerUnavailable, TorchCacheError, TransientError
from torchcache.lanes.access import Access, TlsConfig
from torchcache.lanes.base import Outcome, ReadOptions
from torchcache.model import ChunkId, Extent, ObjectId, ObjectInfo
from torchcache.pool.buffers import WriteCall, write_calls
from torchcache.pool.discovery import member_source
from torchcache.pool.members import Member
from torchcache.pool.saves import folder_key
from torchcache.pool.session import Session
from torchcache.save_names import MANIFEST_NAME, METADATA_NAME, saved_file
from torchcache.tokens import Scope, ScopedToken
from torchcache.wire.limits import MAX_INLINE_BYTES
from torchcache.wire.request_ids import new_request_id
from torchcache.wire.v1 import cache_pb2
from torchcache_server.cache.saves import Save

_log = logging.getLogger(__name__)

CALL_S: Final = 10.0
SILENT_S: Final = 3.0
"""Who took so long for no answer isn't asked again before the next look."""
PREPARE_S: Final = 60.0
"""The bytes are synced first."""
SLOWEST_BYTES_S: Final = 1024 * 1024
SEND_CHUNKS: Final = 4
"""In one call: so much waits in memory, and is sent before it is looked whether the copy is still wanted."""


def peers_access(tokens: Sequence[ScopedToken]) -> Access:
    """How a server that accepts `tokens` gets in at the others, who accept the same: with the least that may write.

    Over TLS by what the environment says, as for clients. Raises ConfigurationError if none may write.
    """
    able = [token for token in tokens if token.scope >= Scope.WRITE]
    if not able:
        raise ConfigurationError(
            "no token of the token file may write: the others would take no copies from here"
        )
    ca = environment.tls_ca()
    certificate, key = environment.tls_client()
    tls = TlsConfig(ca=ca, certificate=certificate, key=key) if ca is not None else None
    return Access(token=min(able, key=lambda token: token.scope).secret, tls=tls)


class Peers:
    """The servers at `pool`, an address as clients have it, but for `server_id`. For one thread, but for `close`."""

    def __init__(self, pool: str, access: Access, *, server_id: str) -> None:
        """Raises ConfigurationError for an address or a way to it that can't be."""
        self._session = Session(member_source(pool, access), "flight")
        self._server_id = server_id
        self._silent: set[str] = set()  # since the last look

    def look(self) -> None:
        """Asks all of them who they are. Raises ServerUnavailable if none answers."""
        session = self._session
        members = session.refresh(session.current, time.monotonic() + CALL_S)
        self._silent = {
            server for server, member in members.by_id.items() if member.address in members.missing
        }

    def others(self, save: Save) -> list[str]:
        """Ids of the others that answer, as far as was found since the last look, in the save's order."""
        members = self._session.current
        if members is None:
            return []
        order = self._session.ordering.order(folder_key(save.key.store, save.key.path), members)
        return [server for server in order if server != self._server_id and server not in self._silent]

    def address(self, server: str) -> str:
        """Of a server, for people."""
        members = self._session.current
        member = members.by_id.get(server) if members is not None else None
        return server if member is None else member.address

    def holds(self, server: str, save: Save) -> bool:
        """Whether a server has the save, or a copy of it, that isn't known to be damaged. False if it doesn't say."""
        try:
            self._prepare(server, save, b"", b"", CALL_S)
        except TorchCacheError as error:
            _log.debug("server %s has no copy of %s: %s", server, save.key, error)
            return False
        return True

    def send(
        self,
        server: str,
        save: Save,
        chunks: Callable[[ObjectInfo], Iterable[tuple[int, pa.Buffer]]],
        sent: Callable[[int], None],
    ) -> None:
        """Has a server hold a copy of the save, all files of which it stores as the save's own.

        `chunks` gives those of an object of this server, verified; `sent` is called behind each call that moved bytes,
        with their number, and may raise to stop. Raises what the server or the wire met.
        """
        for name, object in save.objects.items():
            target = ObjectInfo(_file(save, name), object.size)
            found = iter(chunks(object))
            while rows := [(0, index, payload) for index, payload in islice(found, SEND_CHUNKS)]:
                sent(self._write(server, save, WriteCall([target], [*rows])))
        metadata, manifest = save.metadata, save.manifest
        if len(metadata) + len(manifest) > MAX_INLINE_BYTES:
            described = [(METADATA_NAME, metadata), (MANIFEST_NAME, manifest)]
            for call in write_calls(
                [(_file(save, f"{save.key.part}{name}"), [data]) for name, data in described]
            ):
                sent(self._write(server, save, call))
            metadata = manifest = b""
        self._prepare(server, save, metadata, manifest, PREPARE_S)

    def fetch(self, save: Save, name: str, index: int) -> memoryview | None:
        """A chunk of a file of the save from another server, verified; None if none that answers has it sound."""
        object = save.objects[name]
        others = {object.id, _file(save, name)}  # a copy that was made later has stored it as the save's own
        for server in self.others(save):
            for id_ in others:
                if server in self._silent:
                    break
                found = self._read(server, save, ObjectInfo(id_, object.size), index)
                if found is not None:
                    return found
        return None

    def close(self) -> None:
        """Closes the connections, and so ends what is asked of others by another thread; it may be called twice."""
        self._session.close()

    # ---- inside ----

    def _member(self, server: str) -> Member:
        """Raises ServerUnavailable if it isn't known."""
        members = self._session.current
        if members is None:
            raise ServerUnavailable("the other servers of the pool aren't known yet")
        return members.known(server)

    @contextmanager
    def _noticing_silence(self, server: str) -> Iterator[None]:
        """Around a call: one that fails for want of an answer is the last until the next look."""
        began_s = time.monotonic()
        try:
            yield
        except TransientError:
            if time.monotonic() - began_s >= SILENT_S:
                self._silent.add(server)
            raise

    def _prepare(self, server: str, save: Save, metadata: bytes, manifest: bytes, timeout_s: float) -> None:
        request = cache_pb2.PrepareCopyRequest(
            save=cache_pb2.SaveRef(
                store=save.key.store, path=save.key.path, part=save.key.part, save_id=save.save_id
            ),
            files=[cache_pb2.SavedFile(name=name, size=size) for name, size in save.files],
            metadata=metadata,
            manifest=manifest,
            overwrite=save.overwrite,
            replaceable=save.replaceable,
            writer=save.writer,
            owner=self._server_id,
            committed_unix_s=save.committed_unix_s,
            replicas=save.replicas,
        )
        member = self._member(server)
        with self._noticing_silence(server):
            self._session.ask_member(member, "PrepareCopy", request, time.monotonic() + timeout_s)

    def _write(self, server: str, save: Save, call: WriteCall) -> int:
        size = sum(data.size for _, _, data in call.rows)
        deadline = time.monotonic() + CALL_S + size / SLOWEST_BYTES_S
        lane = self._member(server).lane
        with self._noticing_silence(server):
            return lane.write(save.namespace, call.objects, call.rows, durable=False, deadline=deadline)

    def _read(self, server: str, save: Save, object: ObjectInfo, index: int) -> memoryview | None:
        chunk = ChunkId(object.id, index)
        extent = Extent(object, chunk.offset, chunk.length(object.size))
        options = ReadOptions(namespace=save.namespace, resident_only=True, request_id=new_request_id())
        deadline = time.monotonic() + CALL_S + extent.length / SLOWEST_BYTES_S
        outcome: Outcome
        try:
            with self._noticing_silence(server):
                (outcome,) = self._member(server).lane.read([extent], [None], options, deadline=deadline)
                if isinstance(outcome, TransientError):
                    raise outcome
        except TorchCacheError as error:
            outcome = error
        if isinstance(outcome, memoryview):
            return outcome
        _log.debug("chunk %d of %s isn't to be had from server %s: %s", index, object.id, server, outcome)
        return None


def _file(save: Save, name: str) -> ObjectId:
    return saved_file(save.key.store, save.key.path, name, save.save_id)
