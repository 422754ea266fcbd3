"""Shards of every format, with the samples they hold: for the tests of formats and datasets."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchcache.data.formats.tfrecord import masked

Samples = Sequence[int]
"""Samples are numbers here; each format writes of them what it can, and `NUMBER` tells them again."""


def tar(numbers: Samples, *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for n in numbers:
            for extension, data in (("TXT", str(n).encode()), ("data.bin", bytes([n % 256]) * (n % 700))):
                info = tarfile.TarInfo(f"folder/{n:06d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def jsonl(numbers: Samples) -> bytes:
    lines = [json.dumps({"n": n, "text": "é" * (n % 50)}) for n in numbers]
    return "".join(line + ("\n", "\r\n", "\n\n")[i % 3] for i, line in enumerate(lines)).encode()


def tfrecord(numbers: Samples) -> bytes:
    return b"".join(tf_frame(struct.pack("<Q", n) + b"x" * (n % 900)) for n in numbers)


def tf_frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def raw(numbers: Samples) -> bytes:
    return b"head" + b"".join(struct.pack("<Q", n) for n in numbers)


def table(numbers: Samples) -> pa.Table:
    return pa.table({"n": pa.array(numbers, pa.int64()), "text": [f"t{n}" for n in numbers]})


def parquet(numbers: Samples) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(numbers), sink, row_group_size=7)
    return sink.getvalue()


def arrow(numbers: Samples) -> bytes:
    return _ipc(pa.ipc.new_file, numbers)


def arrow_stream(numbers: Samples) -> bytes:
    return _ipc(pa.ipc.new_stream, numbers)


def _ipc(opener: Callable[..., Any], numbers: Samples) -> bytes:
    sink = io.BytesIO()
    data = table(numbers)
    with opener(sink, data.schema) as writer:
        for batch in data.to_batches(max_chunksize=5):
            writer.write_batch(batch)
    return sink.getvalue()


WRITERS: dict[str, Callable[[Samples], bytes]] = {
    "tar": tar,
    "jsonl": jsonl,
    "tfrecord": tfrecord,
    "raw": raw,
    "parquet": parquet,
    "arrow": arrow,
    "arrows": arrow_stream,
}

NUMBER: dict[str, Callable[[Any], int]] = {
    "tar": lambda sample: int(sample["txt"]),
    "jsonl": lambda sample: sample["n"],
    "tfrecord": lambda sample: struct.unpack_from("<Q", sample)[0],
    "raw": lambda sample: struct.unpack("<Q", sample)[0],
    "parquet": lambda sample: sample["n"],
    "arrow": lambda sample: sample["n"],
    "arrows": lambda sample: sample["n"],
}


def packed(data: bytes, compression: str) -> bytes:
    """`data` as it is (""), or as ".zst" or ".gz"."""
    if compression == ".zst":
        return bytes(pa.compress(data, codec="zstd", asbytes=True))
    return gzip.compress(data) if compression == ".gz" else data
