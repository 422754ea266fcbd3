"""The local lane's writing side: bytes go straight into files that the server handed out, one commit makes them real.

1. PrepareWrite: the server makes segments for this write alone, and says where each record goes.
2. Open them, take a shared flock, look whether each is still the file that was meant.
3. Write payloads and headers, from the caller's memory.
4. CommitWrite: the server looks at the headers, puts them into its index, syncs.

The flock is our sign of life, and keeps the file from becoming another one while we write; the kernel lets go of it
when we die. What can't be done this way (`NotWritable`) the flight lane can do instead.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from torchcache.errors import TorchCacheError
from torchcache.lanes.base import Row
from torchcache.lanes.connections import Connections, connections
from torchcache.lanes.flight import object_refs, remaining
from torchcache.lanes.record_writing import FILES, FileCalls, Record, SegmentWriter
from torchcache.model import ObjectInfo
from torchcache.records import (
    ALIGN_BYTES,
    SEGMENTS,
    SegmentHeader,
    file_name,
    folder_name,
)
from torchcache.threads import Threads
from torchcache.wire.v1 import cache_pb2

WORTH_IT_BYTES: Final = 1024 * 1024
"""Less goes by the flight lane: its one call costs less than three, and a segment of its own."""

_MAX_REQUEST_BYTES: Final = 2 * 1024 * 1024  # the server takes 4 MiB
_THREADS: Final = min(4, os.cpu_count() or 1)
_WORTH_THREADS_BYTES: Final = 32 * 1024 * 1024
_HOLD_TRIES: Final = 100
_HOLD_PAUSE_S: Final = 0.005
_ABANDON_S: Final = 2.0

_log = logging.getLogger(__name__)


class NotWritable(Exception):
    """This write can't be done by this lane: let the flight lane do it."""


class Control(Protocol):
    """What of a server's control service is called here."""

    def call(self, method: str, request: Any, *, deadline: float) -> Any:
        """The reply. Raises TorchCacheError."""


class _Part(NamedTuple):
    """An open file, and the records that go into it, by rising offset."""

    fd: int
    nonce: int
    records: list[Record]


class LocalWriter:
    """Writes into the store in `folder`, which is of this host, for the server behind `control`. Thread-safe.

    `server` is how errors name it.
    """

    def __init__(
        self,
        control: Control,
        folder: str | Path,
        *,
        server: str,
        files: FileCalls = FILES,
        registry: Connections = connections,
    ) -> None:
        self._control = control
        self._folder = str(folder)
        self._server = server
        self._files = files
        self._connections = registry

    def write(
        self,
        namespace: str,
        objects: Sequence[ObjectInfo],
        rows: Sequence[Row],
        *,
        durable: bool,
        deadline: float,
    ) -> int:
        """As `Lane.write`. Raises NotWritable too, and then nothing is left of it."""
        size_bytes: int = sum(data.size for _, _, data in rows)
        if size_bytes < WORTH_IT_BYTES:
            raise NotWritable("too little to be worth it")
        request = _request(namespace, objects, rows, remaining(deadline, self._server))
        if request.ByteSize() > _MAX_REQUEST_BYTES:
            raise NotWritable("too many objects for a message")
        # Within a call: a fork waits, so that no child inherits our locks.
        with self._connections.call():
            reply = self._control.call("PrepareWrite", request, deadline=deadline)
            if not reply.write_id:
                raise NotWritable("too little to be worth a segment")
            try:
                with self._opened(namespace, reply, objects, rows) as parts:
                    self._write_parts(parts, deadline)
                    commit = cache_pb2.CommitWriteRequest(write_id=reply.write_id, durable=durable)
                    self._control.call("CommitWrite", commit, deadline=deadline)
            except (OSError, NotWritable) as error:
                self._abandon(reply.write_id)
                if isinstance(error, NotWritable):
                    raise
                raise NotWritable(f"the store's files can't be written from here: {error}") from error
            except BaseException:
                self._abandon(reply.write_id)
                raise
        return size_bytes

    @contextmanager
    def _opened(
        self, namespace: str, reply: Any, objects: Sequence[ObjectInfo], rows: Sequence[Row]
    ) -> Iterator[list[_Part]]:
        """The handed-out files, open and held, each with its records. Raises OSError, NotWritable."""
        folder = os.path.join(self._folder, SEGMENTS, folder_name(namespace))
        parts: list[_Part] = []
        try:
            for file in reply.files:
                # The answer holds no path: whatever a server says, nothing outside its store is touched.
                fd = self._files.open(os.path.join(folder, file_name(file.number, file.nonce)))
                parts.append(_Part(fd, file.nonce, []))
                self._hold(fd)
                self._check_header(fd, file, namespace)
            self._assign(parts, reply, objects, rows)
            yield parts
        finally:
            for part in parts:
                self._files.close(part.fd)

    def _hold(self, fd: int) -> None:
        for _ in range(_HOLD_TRIES):
            if self._files.hold(fd):
                return
            time.sleep(_HOLD_PAUSE_S)  # the server looks whether anybody holds it, for a moment
        raise NotWritable("a file that was handed out is locked by somebody else")

    def _check_header(self, fd: int, file: Any, namespace: str) -> None:
        """Behind the lock: from here on it stays what it is."""
        expected = SegmentHeader(file.number, file.nonce, file.size, namespace, handed_out=True).encode()
        found = b""
        while len(found) < len(expected) and (
            part := self._files.pread(fd, len(expected) - len(found), len(found))
        ):
            found += part
        if found != expected:
            raise NotWritable("a file that was handed out has become another one")

    def _assign(
        self, parts: Sequence[_Part], reply: Any, objects: Sequence[ObjectInfo], rows: Sequence[Row]
    ) -> None:
        """Gives each part its records. Raises NotWritable for an answer that doesn't fit the question."""
        if not len(rows) == len(reply.file) == len(reply.offset):
            raise NotWritable("the server's answer doesn't have a place for every chunk")
        for (number, index, data), file, offset in zip(rows, reply.file, reply.offset, strict=True):
            if file < 0:  # the store has it already
                continue
            record = Record(objects[number], index, data, offset)
            if file >= len(parts) or offset % ALIGN_BYTES or offset < ALIGN_BYTES:
                raise NotWritable("the server's answer has a place that isn't in its files")
            if record.end > reply.files[file].size:
                raise NotWritable("the server's answer has a place beyond the end of its file")
            parts[file].records.append(record)

    def _write_parts(self, parts: Sequence[_Part], deadline: float) -> None:
        """Writes all records: files side by side, as writers of one file would wait for each other in the kernel."""
        size_bytes = sum(record.data.size for part in parts for record in part.records)
        if len(parts) < 2 or size_bytes < _WORTH_THREADS_BYTES:
            for part in parts:
                self._write_part(part, deadline)
            return
        with Threads(min(_THREADS, len(parts)), name="torchcache-local-write") as threads:
            tasks = [threads.submit(self._write_part, part, deadline) for part in parts]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()

    def _write_part(self, part: _Part, deadline: float) -> None:
        writer = SegmentWriter(self._files, part.fd, part.nonce)
        for record in part.records:
            remaining(deadline, self._server)
            writer.write(record)
        writer.flush()

    def _abandon(self, write_id: str) -> None:
        """Gives back what was handed out. Only an attempt: a server finds out by itself."""
        try:
            request = cache_pb2.AbandonWriteRequest(write_id=write_id)
            self._control.call("AbandonWrite", request, deadline=time.monotonic() + _ABANDON_S)
        except TorchCacheError as error:
            _log.info("a write that failed is given back by the server later: %s", error)


def _request(namespace: str, objects: Sequence[ObjectInfo], rows: Sequence[Row], timeout_s: float) -> Any:
    refs, places = object_refs(objects)
    return cache_pb2.PrepareWriteRequest(
        namespace=namespace,
        objects=refs,
        object=[places[number] for number, _, _ in rows],
        chunk=[index for _, index, _ in rows],
        timeout_s=timeout_s,
    )
