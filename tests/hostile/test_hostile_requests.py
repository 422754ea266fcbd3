"""Requests that are none, or that point outside of what they bring: every control method, tickets, writes, commits."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.hostile.hostile_server import CONTENT, HostileServer, outcome, refusal
from torchcache.errors import CheckpointError, ConfigurationError, IntegrityError, TorchCacheError
from torchcache.model import CHUNK_BYTES, chunk_digest
from torchcache.wire.codec import WRITE_SCHEMA, encode_chunks
from torchcache.wire.v1 import cache_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
EMBEDDED = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # a varint of eleven bytes


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_what_is_no_message_is_refused_by_every_method(server: HostileServer, method: str) -> None:
    for garbage in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", EMBEDDED, b"\x0b" * 200, b"\x0a\x02\xff\xfe\x0b"):
        error = refusal(partial(server.raw, method, garbage))
        assert isinstance(error, ConfigurationError)
        assert "no message of this call" in str(error)


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("method", ["StatObject", "ListObjects", "Evict", "GetSave", "SetCredentials"])
def test_text_that_is_not_unicode_is_refused(server: HostileServer, method: str) -> None:
    """A surrogate, an overlong slash, half a character: in the first field, whatever that is called."""
    for text in (b"\xed\xa0\x80", b"\xc0\xaf", b"\xe2\x82", b"\xff"):
        request = b"\x0a" + bytes([len(text)]) + text
        if method == "SetCredentials":
            request = b"\x0a" + bytes([len(text) + 2]) + b"\x0a" + bytes([len(text)]) + text
        error = refusal(partial(server.raw, method, request))
        assert isinstance(error, ConfigurationError)


@pytest.mark.hostile("wire")
def test_fields_that_nobody_knows_are_passed_over(server: HostileServer) -> None:
    unknown = b"".join(struct.pack("<BB", 0x80 | (n % 16 << 3 & 0x78), 8) + b"\x01" for n in range(100))
    assert pb.InfoReply.FromString(server.raw("GetInfo", unknown)).server_id


def ref(**fields: Any) -> pb.ObjectRef:
    return pb.ObjectRef(**{"store": "samples", "key": "k", "version": "1", "size": 100, **fields})


def ticket(objects: Sequence[pb.ObjectRef] = (ref(),), **fields: Any) -> bytes:
    asked = {"namespace": "n", "objects": objects, "object": [0], "offset": [0], "length": [-1], **fields}
    return pb.ReadRequest(**asked).SerializeToString()


FAR = (1 << 63) - 1
TICKETS: dict[str, bytes] = {
    "noise": b"\xff\xfe" * 50,
    "cut short": ticket()[:-3],
    "another message": pb.SaveRef(store="s", path="p").SerializeToString() + b"\x0a\x01\xff",
    "no such object": ticket(object=[1]),
    "the last object there can be": ticket(object=[(1 << 32) - 1]),
    "fewer offsets": ticket(offset=[]),
    "more lengths": ticket(length=[-1, -1]),
    "before the beginning": ticket(offset=[-1]),
    "as far before it as can be": ticket(offset=[-FAR - 1]),
    "behind the end": ticket(offset=[101]),
    "beyond the end": ticket(length=[101]),
    "a sum that overflows": ticket(offset=[100], length=[FAR]),
    "another sum that overflows": ticket([ref(size=-1)], offset=[FAR], length=[FAR]),
    "a negative length": ticket(length=[-2]),
    "the least length": ticket(length=[-FAR - 1]),
    "an object of negative size": ticket([ref(size=-2)]),
    "an object of an exabyte": ticket([ref(size=1 << 60)]),
    "a file of unknown size": ticket([ref(store="file", size=-1)]),
    "no key": ticket([ref(key="")]),
    "no version": ticket([ref(version="")]),
    "no store": ticket([ref(store="")]),
    "a version of 2 KB": ticket([ref(version="v" * 2000)]),
    "a store of 2 KB": ticket([ref(store="s" * 2000)]),
    "a key of 5 KB": ticket([ref(key="k" * 5000)]),
    "a namespace of 10 KB": ticket(namespace="n" * 10_000),
    "too many extents": ticket(object=[0] * 65_537, offset=[0] * 65_537, length=[0] * 65_537),
    "too many objects": ticket([ref()] * 65_537),
    "a time that is none": ticket(timeout_s=float("nan")),
    "a negative time": ticket(timeout_s=-1.0),
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("name", TICKETS)
def test_a_ticket_that_makes_no_sense_is_refused(server: HostileServer, name: str) -> None:
    assert isinstance(refusal(lambda: server.ticket(TICKETS[name])), ConfigurationError)


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("timeout_s", [float("inf"), 1e308, 5e-324])
def test_a_time_that_is_only_odd_is_bounded(server: HostileServer, timeout_s: float) -> None:
    assert server.ticket(ticket([ref(key="not there")], timeout_s=timeout_s))


@pytest.mark.hostile("wire")
@pytest.mark.parametrize(
    "call", ["list_flights", "get_flight_info", "get_schema", "do_action", "list_actions", "do_exchange"]
)
def test_no_other_call_of_flight_is_there(server: HostileServer, call: str) -> None:
    client, options = server.client.flight, server.client.options
    descriptor = fl.FlightDescriptor.for_command(ticket())
    calls: dict[str, Any] = {
        "list_flights": lambda: list(client.list_flights(options=options)),
        "get_flight_info": lambda: client.get_flight_info(descriptor, options),
        "get_schema": lambda: client.get_schema(descriptor, options),
        "do_action": lambda: list(client.do_action(fl.Action("shutdown", b""), options)),
        "list_actions": lambda: client.list_actions(options),
        "do_exchange": lambda: list(client.do_exchange(descriptor, options)[1]),
    }
    with pytest.raises((fl.FlightUnauthorizedError, OSError), match="no Flight call but do_get and do_put"):
        calls[call]()


GOOD = (0, 0, chunk_digest(CONTENT), pa.py_buffer(CONTENT))
SAMPLE = ref(key="hostile", size=len(CONTENT))


def rows(*changed: tuple[int, int, int, Any]) -> list[pa.RecordBatch]:
    return [encode_chunks(list(changed))]


def column(index: int, array: pa.Array) -> list[pa.RecordBatch]:
    """The good batch with another column."""
    (batch,) = rows(GOOD)
    columns = [array if at == index else batch.column(at) for at in range(4)]
    return [pa.RecordBatch.from_arrays(columns, schema=WRITE_SCHEMA)]


def view(size: int, buffer: int, offset: int, payload: bytes = CONTENT) -> pa.Array:
    """A column of one view that may lead anywhere."""
    views = struct.pack("<i4sii", size, payload[:4], buffer, offset)
    return pa.Array.from_buffers(pa.binary_view(), 1, [None, pa.py_buffer(views), pa.py_buffer(payload)])


BIG = bytes(CHUNK_BYTES + 1)

WRITES: dict[str, tuple[Any, list[pa.RecordBatch]]] = {
    "an object that isn't listed": ([SAMPLE], rows((1, *GOOD[1:]))),
    "the last object there can be": ([SAMPLE], rows(((1 << 32) - 1, *GOOD[1:]))),
    "a chunk behind the end": ([SAMPLE], rows((0, 1, *GOOD[2:]))),
    "the last chunk there can be": ([SAMPLE], rows((0, (1 << 32) - 1, *GOOD[2:]))),
    "another checksum": ([SAMPLE], rows((0, 0, GOOD[2] ^ 1, GOOD[3]))),
    "no checksum": ([SAMPLE], rows((0, 0, 0, GOOD[3]))),
    "fewer bytes": ([SAMPLE], rows((0, 0, chunk_digest(CONTENT[:-1]), pa.py_buffer(CONTENT[:-1])))),
    "more bytes": ([SAMPLE], rows((0, 0, chunk_digest(CONTENT + b"x"), pa.py_buffer(CONTENT + b"x")))),
    "no bytes": ([SAMPLE], rows((0, 0, chunk_digest(b""), pa.py_buffer(b"")))),
    "a chunk too large": ([ref(size=len(BIG))], rows((0, 0, chunk_digest(BIG), pa.py_buffer(BIG)))),
    "a good row and a bad one": ([SAMPLE], rows(GOOD, (0, 7, *GOOD[2:]))),
    "a null for bytes": ([SAMPLE], column(3, pa.nulls(1, pa.binary_view()))),
    "a view beyond its buffer": ([SAMPLE], column(3, view(len(CONTENT), 0, 5))),
    "a view far beyond it": ([SAMPLE], column(3, view(len(CONTENT), 0, (1 << 31) - 1))),
    "a view of no buffer": ([SAMPLE], column(3, view(len(CONTENT), 9, 0))),
    "a view of a negative buffer": ([SAMPLE], column(3, view(len(CONTENT), -1, 0))),
    "a view of negative size": ([SAMPLE], column(3, view(-1, 0, 0))),
    "a view before its buffer": ([SAMPLE], column(3, view(len(CONTENT), 0, -5))),
    "of the under-store's own": ([ref(store="file", key="a", size=len(CONTENT))], rows(GOOD)),
    "of an unknown size": ([ref(size=-1)], rows(GOOD)),
    "of another save": ([ref(store="file", key="run/x", version="save:1", size=len(CONTENT))], rows(GOOD)),
    "of no object": ([], rows(GOOD)),
    "of a batch too large": ([SAMPLE], rows(*[(0, 0, 0, pa.py_buffer(bytes(1 << 20)))] * 17)),
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_makes_no_sense_is_refused(server: HostileServer, name: str) -> None:
    objects, batches = WRITES[name]
    error = refusal(lambda: server.put("hostile", objects, batches))
    assert isinstance(error, ConfigurationError | IntegrityError)
    (held,) = server.client.read([ref(key="hostile", size=-1)])
    server.client.call("Evict", pb.EvictRequest(namespace="hostile"))
    assert "NotResident" in str(held), "nothing of it is stored"


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("prefix", ["save:file/run@1", "put:file/run@1", "save:", "put:"])
def test_no_sample_goes_where_bytes_are_kept_for_good(server: HostileServer, prefix: str) -> None:
    error = refusal(lambda: server.put(prefix, [SAMPLE], rows(GOOD)))
    assert isinstance(error, ConfigurationError)
    assert prefix not in {namespace.name for namespace in server.client.status().namespaces}


SCHEMAS: dict[str, pa.Schema] = {
    "nothing": pa.schema([]),
    "one column less": pa.schema(list(WRITE_SCHEMA)[:3]),
    "other numbers": WRITE_SCHEMA.set(0, pa.field("object", pa.int64())),
    "plain binary": WRITE_SCHEMA.set(3, pa.field("data", pa.binary())),
    "another name": WRITE_SCHEMA.set(0, pa.field("thing", pa.uint32())),
    "another order": pa.schema(list(WRITE_SCHEMA)[::-1]),
    "a dictionary": WRITE_SCHEMA.set(0, pa.field("object", pa.dictionary(pa.int32(), pa.uint32()))),
    "deep": pa.schema(
        [("x", pa.list_(pa.list_(pa.list_(pa.struct([("y", pa.map_(pa.int8(), pa.int8()))])))))]
    ),
    "a thousand columns": pa.schema([(f"c{n}", pa.int8()) for n in range(1000)]),
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_write_of_another_schema_is_refused(server: HostileServer, name: str) -> None:
    command = pb.WriteRequest(namespace="hostile", objects=[SAMPLE]).SerializeToString()
    error = refusal(lambda: server.put_raw(command, [], SCHEMAS[name]))
    assert isinstance(error, ConfigurationError)
    assert "another schema" in str(error)


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("command", [b"", b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"hello"])
def test_a_descriptor_that_is_none_is_refused(server: HostileServer, command: bytes) -> None:
    assert isinstance(refusal(lambda: server.put_raw(command, [])), ConfigurationError)


SAVE = pb.SaveRef(store="file", path="hostile/step-1", save_id="id1")
SHARD = pb.SavedFile(name="__0_0.distcp", size=len(CONTENT))

FILES: dict[str, list[pb.SavedFile]] = {
    "up": [pb.SavedFile(name="../x", size=1)],
    "far up": [pb.SavedFile(name="../../../outside/x", size=1)],
    "absolute": [pb.SavedFile(name="/etc/x", size=1)],
    "here": [pb.SavedFile(name=".", size=1)],
    "only up": [pb.SavedFile(name="..", size=1)],
    "up amid": [pb.SavedFile(name="a/../../x", size=1)],
    "an empty segment": [pb.SavedFile(name="a//x", size=1)],
    "a slash at the end": [pb.SavedFile(name="a/", size=1)],
    "no name": [pb.SavedFile(name="", size=1)],
    "a NUL": [pb.SavedFile(name="a\0b", size=1)],
    "the metadata": [pb.SavedFile(name=".metadata", size=1)],
    "the manifest": [pb.SavedFile(name=".torchcache.json", size=1)],
    "twice": [SHARD, SHARD],
    "a negative size": [pb.SavedFile(name="x", size=-1)],
    "the least size": [pb.SavedFile(name="x", size=-FAR - 1)],
    "an exabyte": [pb.SavedFile(name="x", size=1 << 60)],
    "exabytes in all": [pb.SavedFile(name=f"x{n}", size=(1 << 50) - 1) for n in range(5000)],
    "what was never put": [pb.SavedFile(name="never", size=100)],
    "another size than was put": [pb.SavedFile(name="__0_0.distcp", size=len(CONTENT) + 1)],
    "a name of 5 KB": [pb.SavedFile(name="n" * 5000, size=1)],
    "a name too long for a file": [pb.SavedFile(name="n" * 300, size=1)],
    "ten thousand that were never put": [pb.SavedFile(name=f"x{n}", size=1) for n in range(10_000)],
    "its own folder": [pb.SavedFile(name="../step-1/x", size=1)],
    "of another path": [pb.SavedFile(name="../step-2/x", size=1)],
}


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize("call", ["CommitSave", "PrepareCopy"])
@pytest.mark.parametrize("name", FILES)
def test_a_save_of_such_files_is_not_committed(server: HostileServer, name: str, call: str) -> None:
    server.client.call("ReserveSave", pb.ReserveSaveRequest(save=SAVE, writer="hostile"))
    shard = pb.ObjectRef(
        store="file", key="hostile/step-1/__0_0.distcp", version="save:id1", size=len(CONTENT)
    )
    server.put("save:file/hostile/step-1@id1", [shard], rows(GOOD))
    fields: dict[str, Any] = {"save": SAVE, "files": FILES[name], "metadata": b"m", "manifest": b"{}"}
    kind = pb.CommitSaveRequest
    if call == "PrepareCopy":
        kind, fields = pb.PrepareCopyRequest, {**fields, "writer": "hostile", "owner": "another"}
    error = refusal(lambda: server.client.call(call, kind(**fields)))
    server.client.call("AbandonSave", pb.AbandonSaveRequest(save=SAVE))
    assert isinstance(error, TorchCacheError)
    for path in sorted((server.source / "hostile").rglob("*"), reverse=True):
        assert path.is_dir(), path
        path.rmdir()
    if (server.source / "hostile").exists():
        (server.source / "hostile").rmdir()
    listed = server.client.call("ListSaves", pb.ListSavesRequest(store="file", prefix=""))
    assert not listed.saves


PATHS = ("", "/", "..", "../run", "/etc", "a//b", "a/", "./a", "a/..", "a\0b", "k" * 5000, "link-out/run")


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("path", PATHS)
def test_no_save_begins_at_such_a_path(server: HostileServer, path: str) -> None:
    ref = pb.SaveRef(store="file", path=path, save_id="id1")
    error = refusal(lambda: server.client.call("ReserveSave", pb.ReserveSaveRequest(save=ref, writer="w")))
    assert isinstance(error, ConfigurationError)
    for save_id in ("", "a/b", "../x", "x" * 65, "\u00fc"):
        bad = pb.SaveRef(store="file", path="run", save_id=save_id)
        error = refusal(
            partial(server.client.call, "ReserveSave", pb.ReserveSaveRequest(save=bad, writer="w"))
        )
        assert isinstance(error, ConfigurationError)


ORDER = {"namespace": "n", "order": "o", "epoch": 0, "length": 10, "total": 2, "first": 0}
MARKS, POSITIONS = np.arange(2, dtype="<u8").tobytes(), np.arange(2, dtype="<u4").tobytes()

NUMBERS: dict[str, tuple[str, Any]] = {
    "an order of 2^62 chunks": (
        "TellOrder",
        pb.TellOrderRequest(**{**ORDER, "total": 1 << 62}, marks=MARKS, positions=POSITIONS),
    ),
    "an order of 2^62 samples": (
        "TellOrder",
        pb.TellOrderRequest(**{**ORDER, "length": 1 << 62}, marks=MARKS, positions=POSITIONS),
    ),
    "an order of half a mark": (
        "TellOrder",
        pb.TellOrderRequest(**ORDER, marks=MARKS[:-1], positions=POSITIONS),
    ),
    "an order beyond its end": (
        "TellOrder",
        pb.TellOrderRequest(**{**ORDER, "first": 1}, marks=MARKS, positions=POSITIONS),
    ),
    "an order of a negative epoch": (
        "TellOrder",
        pb.TellOrderRequest(**{**ORDER, "epoch": -1}, marks=MARKS, positions=POSITIONS),
    ),
    "positions beyond the epoch": (
        "TellOrder",
        pb.TellOrderRequest(**{**ORDER, "length": 1}, marks=MARKS, positions=POSITIONS),
    ),
    "use of 2^62 chunks": ("ReportUse", pb.ReportUseRequest(namespaces=["n"], chunks=1 << 62)),
    "negative use": ("ReportUse", pb.ReportUseRequest(namespaces=["n"], bytes=-1)),
    "use of 5000 namespaces": ("ReportUse", pb.ReportUseRequest(namespaces=[f"n{n}" for n in range(5000)])),
    "a time to live of NaN": ("SetPolicy", pb.SetPolicyRequest(namespace="n", ttl_s=float("nan"))),
    "a time to live without end": ("SetPolicy", pb.SetPolicyRequest(namespace="n", ttl_s=float("inf"))),
    "a negative quota": ("SetPolicy", pb.SetPolicyRequest(namespace="n", quota_bytes=-1)),
    "a negative time to wait": (
        "PublishObject",
        pb.PublishRequest(store="file", key="k", write_id="w", size=1, wait_s=-1),
    ),
    "an object of negative size": (
        "PublishObject",
        pb.PublishRequest(store="file", key="k", write_id="w", size=-1),
    ),
    "chunks that no object has": (
        "PrepareWrite",
        pb.PrepareWriteRequest(namespace="n", objects=[SAMPLE], object=[0], chunk=[9]),
    ),
    "chunks of no object": (
        "PrepareWrite",
        pb.PrepareWriteRequest(namespace="n", objects=[], object=[0], chunk=[0]),
    ),
    "a commit of no write": ("CommitWrite", pb.CommitWriteRequest(write_id="../../x")),
    "variables that are no credentials": (
        "SetCredentials",
        pb.CredentialsRequest(variables={"LD_PRELOAD": "/tmp/x"}),
    ),
}


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_make_no_sense_are_refused(server: HostileServer, name: str) -> None:
    error = outcome(lambda: server.client.call(*NUMBERS[name]))
    assert isinstance(error, TorchCacheError)


@pytest.mark.hostile("wire")
def test_a_save_borrows_nothing_that_it_may_not(server: HostileServer) -> None:
    """Another run's files, those of a save it can only guess, what isn't a file, and what nobody lent it."""
    put = partial(server.put, "save:file/run/step-1@base")
    payload = b"frozen" * 1000
    shard = pb.ObjectRef(store="file", key="run/step-1/__0_0.distcp", version="save:base", size=len(payload))
    put([shard], [encode_chunks([(0, 0, chunk_digest(payload), pa.py_buffer(payload))])])
    base = pb.SaveRef(store="file", path="run/step-1", save_id="base")
    files = [pb.SavedFile(name="__0_0.distcp", size=len(payload))]
    server.client.call("ReserveSave", pb.ReserveSaveRequest(save=base, writer="a test"))
    server.client.call(
        "CommitSave", pb.CommitSaveRequest(save=base, files=files, metadata=b"m", manifest=b"{}")
    )
    mine = pb.SaveRef(store="file", path="run/step-2", save_id="mine")
    server.client.call("ReserveSave", pb.ReserveSaveRequest(save=mine, writer="a test"))

    def borrow(save: pb.SaveRef, of: pb.SaveRef, *names: str) -> list[str]:
        request = pb.BorrowFilesRequest(save=save, base=of, names=names)
        return list(server.client.call("BorrowFiles", request).names)

    for name in ("__9_0.distcp", ".metadata", "../step-1/__0_0.distcp", "a" * 4000):
        assert borrow(mine, base, name) == []
    guessed = pb.SaveRef(store="file", path="run/step-1", save_id="guessed")
    assert borrow(mine, guessed, "__0_0.distcp") == []
    elsewhere = pb.SaveRef(store="file", path="elsewhere/step-2", save_id="mine")
    for save, of in ((elsewhere, base), (pb.SaveRef(store="s3", path="run/step-2", save_id="mine"), base)):
        assert isinstance(refusal(partial(borrow, save, of, "__0_0.distcp")), ConfigurationError)
    stolen = [pb.SavedFile(name="__0_0.distcp", size=len(payload), borrowed=True)]
    commit = pb.CommitSaveRequest(save=mine, files=stolen, metadata=b"m", manifest=b"{}")
    assert isinstance(refusal(partial(server.client.call, "CommitSave", commit)), CheckpointError)
    for save in (mine, base, guessed, elsewhere):
        server.client.call(
            "ReturnFiles", pb.ReturnFilesRequest(save=save, names=["__0_0.distcp", "../x", ""])
        )
    assert borrow(mine, base, "__0_0.distcp") == ["__0_0.distcp"]
    longer = [pb.SavedFile(name="__0_0.distcp", size=len(payload) + 1, borrowed=True)]
    commit = pb.CommitSaveRequest(save=mine, files=longer, metadata=b"m", manifest=b"{}")
    assert isinstance(refusal(partial(server.client.call, "CommitSave", commit)), CheckpointError)
    server.client.call("AbandonSave", pb.AbandonSaveRequest(save=mine))
    deleted = pb.DeleteSaveRequest(save=base, wait_s=20)
    assert server.client.call("DeleteSave", deleted).done
    shutil.rmtree(server.source / "run")  # what is left of the two is empty
