"""A client that writes into a store's files by itself, the control calls between them made without a wire."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from torchcache_server.service.control import ControlService
from torchcache_server.service.counters import ServiceCounters
from torchcache_server.store import HandedOut, Store

from tests.unit.store_parts import payload
from torchcache.lanes.local_writing import LocalWriter
from torchcache.lanes.record_writing import FILES, FileCalls, Record, SegmentWriter
from torchcache.model import ChunkId, ObjectId, ObjectInfo
from torchcache.records import file_name, folder_name

NAMESPACE = "samples:written@1"


class Calls:
    """Control calls of one server, `before` being told each by name; what was asked last is kept."""

    def __init__(self, store: Store, before: Callable[[str], None] = lambda _: None) -> None:
        self.store = store
        self.before = before
        self.counters = ServiceCounters()
        self.made: list[str] = []
        self.replies: dict[str, Any] = {}

    def call(self, method: str, request: Any, *, deadline: float) -> Any:
        assert deadline > time.monotonic()
        self.before(method)
        self.made.append(method)
        nothing = cast(Any, None)
        service = ControlService(
            facts=nothing,
            store=self.store,
            under_stores={},
            read_through=nothing,
            write_back=nothing,
            policies=nothing,
            ahead=nothing,
            counters=self.counters,
            set_credentials=nothing,
        )
        reply = self.replies[method] = getattr(service, method)(request, nothing)
        return reply


def sample(number: int, size: int) -> ObjectInfo:
    return ObjectInfo(ObjectId("samples", f"written/{number}", "1"), size)


class Client:
    """Writes samples of `size` bytes, each of one chunk, into the store in `folder`."""

    def __init__(self, store: Store, folder: Path, size: int, *, files: FileCalls = FILES) -> None:
        self.calls = Calls(store)
        self.size = size
        self.writer = LocalWriter(self.calls, folder, server="here", files=files)

    def write(self, numbers: Iterable[int], *, namespace: str = NAMESPACE, durable: bool = False) -> int:
        objects = [sample(number, self.size) for number in numbers]
        rows = [(i, 0, pa.py_buffer(payload(n, self.size))) for i, n in enumerate(numbers)]
        return self.writer.write(namespace, objects, rows, durable=durable, deadline=time.monotonic() + 60)

    def held(self, number: int) -> bool:
        """Whether the store has the sample; wrong bytes fail the test."""
        found = self.calls.store.lookup(ChunkId(sample(number, self.size).id, 0))
        if found is None:
            return False
        assert found.is_intact()
        assert bytes(found.payload) == payload(number, self.size)
        return True


@contextmanager
def opened(folder: Path, namespace: str, got: HandedOut, files: FileCalls = FILES) -> Iterator[list[int]]:
    """The descriptors of what the store in `folder` handed out, held as a client holds them."""
    paths = [
        os.path.join(folder, "segments", folder_name(namespace), file_name(file.number, file.nonce))
        for file in got.files
    ]
    fds = [files.open(path) for path in paths]
    try:
        for fd in fds:
            assert files.hold(fd)
        yield fds
    finally:
        for fd in fds:
            files.close(fd)


def write_records(
    fds: Sequence[int],
    got: HandedOut,
    rows: Iterable[tuple[ChunkId, int, bytes]],
    files: FileCalls = FILES,
) -> None:
    """Writes the chunks, each with the size of its object, to their places."""
    for (chunk, size, data), place in zip(rows, got.places, strict=False):
        if place is not None:
            writer = SegmentWriter(files, fds[place.file], got.files[place.file].nonce)
            writer.write(
                Record(ObjectInfo(chunk.object, size), chunk.index, pa.py_buffer(data), place.offset)
            )
            writer.flush()
