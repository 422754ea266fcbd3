"""What parses bytes of others, a function each: any input ends in a value that holds, or in an error of ours."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import numpy as np
import xxhash
from torchcache_server.service.reading import chunks_of
from torchcache_server.service.requests import MAX_OBJECT_BYTES, read_plan, write_plan

from torchcache import records
from torchcache.checkpoint.manifest import Item, Manifest, Tensor, payload_digests
from torchcache.checkpoint.safetensors_header import parse_header
from torchcache.data import codec
from torchcache.data.iterable_index import ShardIndex
from torchcache.errors import ConfigurationError, IntegrityError, TorchCacheError
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ChunkId, ObjectId
from torchcache.records import RecordHeader, decode_record, encode_record, header_bytes
from torchcache.tokens import parse_tokens
from torchcache.wire.status import MAX_ERROR_CHARACTERS, decode_error, encode_error
from torchcache.wire.v1 import cache_pb2 as pb

NONCE: Final = 0x5EED


@dataclass(frozen=True, kw_only=True)
class Target:
    """`run` raises for an input that wasn't handled as it must be. `seeds` are inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def header(data: bytes) -> None:
    """A record's header, as it is, and again with a checksum that fits it: what lies behind that is reached too."""
    signed = bytearray(data)
    if len(signed) >= records.IDENTITY_AT:
        length = min(len(signed), struct.unpack_from("<I", signed, 20)[0])
        seed = records._seed_of(NONCE, 0)
        fitting = xxhash.xxh3_64_intdigest(memoryview(signed)[records._CHECKED_FROM : length], seed=seed)
        struct.pack_into("<Q", signed, 8, fitting)
    for view in (memoryview(data), memoryview(signed)):
        found = decode_record(view, NONCE, 0)
        if found is not None:
            assert found.length + found.payload_bytes <= len(view)
            assert len(found.block_digests) == 8 * -(-found.payload_bytes // BLOCK_BYTES)
            assert found.length == header_bytes(len(found.identity), found.payload_bytes)


def checkpoint_manifest(data: bytes) -> None:
    """A checkpoint's manifest, as it is; and a good one, values exchanged as `data` says, with a digest that fits."""
    body = _exchanged(json.loads(_manifest().encode())["body"], data)
    encoded = json.dumps(body, separators=(",", ":")).encode()
    outer = {"format": "torchcache-checkpoint", "version": 1, "sha256": hashlib.sha256(encoded).hexdigest()}
    for candidate in (data, json.dumps({**outer, "body": body}).encode()):
        try:
            found = Manifest.decode(candidate, where="x")
        except IntegrityError:
            continue
        for item in found.items:
            assert 0 <= item.start <= item.start + item.length <= found.files[item.file]
            assert 0 <= item.payload_start <= item.payload_start + item.payload_length <= item.length
        for name in found.files:
            assert ".." not in name.split("/") and not name.startswith("/")


VALUES: Final = (
    *(
        None,
        True,
        "",
        "x",
        "../x",
        "/x",
        "a\0b",
        "__0_0.distcp",
        "0" * 16,
        [],
        {},
        [[]],
        [1],
        1.5,
        float("inf"),
    ),
    *(
        0,
        1,
        2,
        -1,
        7,
        64,
        1 << 31,
        1 << 50,
        (1 << 63) - 1,
        1 << 64,
        -(1 << 63),
        "tensor",
        "bytes",
        "zstd",
        "float32",
    ),
)


def _exchanged(body: Any, data: bytes) -> Any:
    """Four bytes are an exchange: a way down, three steps at most, and the value that comes there."""
    for at in range(0, min(len(data), 64) - 3, 4):
        place = body
        for step in data[at : at + 3]:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = keys[step % len(keys)]
            if not isinstance(place[key], dict | list) or step & 128:
                place[key] = deepcopy(VALUES[data[at + 3] % len(VALUES)])  # else it were exchanged, too
                break
            place = place[key]
    return body


@cache
def _manifest() -> Manifest:
    item = Item(
        name="w",
        offset=(0, 0),
        index=0,
        kind="tensor",
        dtype="float32",
        shape=(2, 4),
        file="__0_0.distcp",
        start=64,
        length=200,
        payload_start=100,
        payload_length=32,
        frame_digest=7,
        digests=payload_digests(memoryview(bytes(32))),
    )
    other = replace(item, name="step", offset=None, index=None, kind="bytes", dtype=None, shape=None)
    tensor = Tensor(
        dtype="float32",
        requires_grad=False,
        pin_memory=False,
        memory_format="contiguous_format",
        size=(2, 4),
        blocks=(((0, 0), (2, 4)),),
    )
    return Manifest(
        save_id="a",
        checkpoint="x",
        created_unix_s=1.0,
        torch="2",
        torchcache="0",
        dcp_version=None,
        files={"__0_0.distcp": 1000},
        tensors={"w": tensor},
        objects=("step",),
        items=(item, replace(other, payload_start=0, payload_length=200, length=200)),
    )


def dataset_index(data: bytes) -> None:
    """What a dataset keeps of a shard in the pool: a record of a sample, and the index in it."""
    for size in (0, 1000, 1 << 40):
        try:
            ShardIndex.of_record(memoryview(data), size)
        except (IntegrityError, ConfigurationError):
            continue


def sample(data: bytes) -> None:
    """A computed sample's record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, for other names of a dtype
        try:
            codec.decode(data)
        except (IntegrityError, ConfigurationError):
            pass


def safetensors(data: bytes) -> None:
    """The header of a safetensors file."""
    try:
        parse_header(data, len(data) + 1000, where="x")
    except IntegrityError:
        pass


def ranges(data: bytes) -> None:
    """The columns of a read: object, offset, length and the objects' sizes, of any value."""
    count = min(len(data) // 28, 64)
    numbers = np.frombuffer(data[: count * 24], "<i8").reshape(-1, 3)
    index = np.frombuffer(data[count * 24 : count * 28], "<u4")
    sizes = [int(row[0]) if row[0] & 7 else int(row[0]) >> 20 for row in numbers]
    store = "samples" if count % 2 else "file"
    request = pb.ReadRequest(
        namespace="n",
        objects=[pb.ObjectRef(store=store, key="k", version="1", size=size) for size in sizes],
        object=[int(number) % (count + 1) for number in index],
        offset=[int(row[1]) if row[1] & 3 else int(row[1]) >> 24 for row in numbers],
        length=[int(row[2]) if row[2] & 3 else int(row[2]) >> 24 for row in numbers],
    )
    ticket(request.SerializeToString())


def ticket(data: bytes) -> None:
    """A Flight ticket: what passes lies within its objects, and names chunks that they have."""
    try:
        plan = read_plan(data)
    except ConfigurationError:
        return
    assert len(plan.object) == len(plan.start) == len(plan.end)
    for number, start, end in zip(plan.object, plan.start, plan.end, strict=True):
        size = plan.objects[number].size
        assert start >= 0 and size <= MAX_OBJECT_BYTES
        if size >= 0:
            assert start <= end <= size
            touched = chunks_of(start, end, size)
            assert len(touched) and touched[-1] <= max(size - 1, 0) // CHUNK_BYTES
    assert not plan.namespace.startswith(("save:", "put:")), "a fill would make it permanent"


def descriptor(data: bytes) -> None:
    """The command of a write: only samples, and files of a save in its own namespace."""
    try:
        plan = write_plan(data)
    except ConfigurationError:
        return
    for info in plan.objects:
        assert 0 <= info.size <= MAX_OBJECT_BYTES
        assert info.id.is_sample or (info.id.is_save and plan.namespace.startswith(("save:", "put:")))


def tokens(data: bytes) -> None:
    """A file of tokens."""
    try:
        found = parse_tokens(data.decode(errors="replace"))
    except ConfigurationError as error:
        assert len(str(error)) < 300, "it shows what it read"
        return
    assert all(16 <= len(token.secret) <= 4096 for token in found)


def error(data: bytes) -> None:
    """An error as a peer tells it."""
    found = decode_error(data.decode(errors="replace"))
    assert isinstance(found, TorchCacheError)
    assert len(encode_error(TorchCacheError(found.message))) <= MAX_ERROR_CHARACTERS


def _record() -> bytes:
    identity = ChunkId(ObjectId("file", "a/b", "1-2"), 0).object.encoded
    fields = RecordHeader(header_bytes(len(identity), 20_000), 20_000, 0, 20_000, 7, identity, bytes(16))
    return encode_record(fields, NONCE, 0) + bytes(20_000)


_READ = pb.ReadRequest(
    namespace="n",
    objects=[pb.ObjectRef(store="samples", key="k", version="1", size=100)],
    object=[0, 0],
    offset=[0, 50],
    length=[-1, 50],
).SerializeToString()
_WRITE = pb.WriteRequest(
    namespace="save:file/run@1",
    objects=[pb.ObjectRef(store="file", key="run/x", version="save:1", size=5)],
    durable=True,
).SerializeToString()
_SAMPLE = bytes(codec.encode({"x": np.arange(5), "y": ["a", 2.5, None], "z": b"bytes"}))
_INDEX = bytes(codec.encode({"count": 3, "starts": np.array([0, 5, 9, 12], np.uint64), "rows": None}))

TARGETS: Final[dict[str, Target]] = {
    "header": Target(run=header, seeds=(_record(), bytes(200))),
    "checkpoint-manifest": Target(run=checkpoint_manifest, seeds=(b"", bytes(16), _manifest().encode())),
    "dataset-index": Target(run=dataset_index, seeds=(_INDEX, _SAMPLE)),
    "sample": Target(run=sample, seeds=(_SAMPLE,)),
    "safetensors": Target(
        run=safetensors,
        seeds=(b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"__metadata__":{"a":"b"}}',),
    ),
    "ranges": Target(run=ranges, seeds=(struct.pack("<6q2I", 100, 0, 50, 100, 50, -1, 0, 1), bytes(280))),
    "ticket": Target(run=ticket, seeds=(_READ,)),
    "descriptor": Target(run=descriptor, seeds=(_WRITE,)),
    "tokens": Target(run=tokens, seeds=(b"read aaaaaaaaaaaaaaaaaaaa\n# x\nbbbbbbbbbbbbbbbbbbbbbbb\n",)),
    "error": Target(run=error, seeds=(b'{"error": "ObjectNotFound", "message": "m", "object": "o"}',)),
}
