"""Records that TreeWriter never wrote: each is an IntegrityError, and none makes the reader big."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.sample_classes import Box, Point
from torchcache.data import codec
from torchcache.errors import ConfigurationError, IntegrityError

SAMPLE = {
    "t": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "n": np.arange(5, dtype=np.int16),
    "s": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
    "g": np.float64(2.5),
    "v": [1, -(2**80), 2.5, 3j, "text", b"bytes", None, True, (Box(1, 2), Point(3))],
}
RECORD = bytes(codec.encode(SAMPLE))
U64 = struct.Struct("<Q")
HUGE = U64.pack(2**63 - 1)


def record(tree: bytes, leaves: bytes = b"") -> bytes:
    """A record with a right header around any tree."""
    body = tree + (bytes(-(24 + len(tree)) % 64) + leaves if leaves else b"")
    return struct.pack("<4sB3xQQ", b"TCS1", 0, len(tree), 24 + len(body)) + body


def text(value: bytes) -> bytes:
    return b"s" + U64.pack(len(value)) + value


def tensor(dtype: bytes, *shape: int) -> bytes:
    return b"t" + text(dtype) + struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape)


def array(dtype: bytes, *shape: int) -> bytes:
    return b"n" + text(dtype) + struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape)


def test_the_forger_forges_well() -> None:
    assert codec.decode(record(b"l" + U64.pack(1) + text(b"x"))) == ["x"]
    assert torch.equal(codec.decode(record(tensor(b"uint8", 3), b"abc")), torch.tensor([97, 98, 99]))  # type: ignore[arg-type]
    assert codec.decode(record(array(b"<i2", 1), b"\1\0")).tolist() == [1]  # type: ignore[attr-defined]


HOSTILE = {
    "nothing": b"",
    "a header's half": RECORD[:20],
    "zeros": bytes(256),
    "another magic": b"TCS2" + RECORD[4:],
    "an unknown kind": RECORD[:4] + b"\7" + RECORD[5:],
    "a longer record": RECORD + b"x",
    "a tree that is too long": RECORD[:8] + HUGE + RECORD[16:],
    "no node": record(b""),
    "an unknown node": record(b"?"),
    "two nodes": record(b"NN"),
    "bytes behind the leaves": record(b"N", b"x"),
    "list count": record(b"l" + HUGE),
    "tuple count": record(b"u" + HUGE),
    "dict count": record(b"d" + HUGE),
    "record count": record(b"a" + text(b"m:C") + HUGE),
    "bytes length": record(b"b" + HUGE),
    "str length": record(b"s" + HUGE),
    "int length": record(b"I" + HUGE),
    "dimensions": record(b"t" + text(b"uint8") + HUGE),
    "not UTF-8": record(text(b"\xff\xfe")),
    "an unhashable key": record(b"d" + U64.pack(1) + b"l" + U64.pack(0) + b"N"),
    "a key twice": record(b"d" + U64.pack(2) + b"NNNN"),
    "equal keys": record(b"d" + U64.pack(2) + b"TN" + b"i" + struct.pack("<q", 1) + b"N"),
    "a class without module": record(b"a" + text(b"Point") + U64.pack(0)),
    "a class by number": record(b"a" + b"i" + U64.pack(0) + U64.pack(0)),
    "an unknown dtype": record(tensor(b"float7", 1), b"x"),
    "a quantized dtype": record(tensor(b"quint8", 1), b"x"),
    "a tensor without bytes": record(tensor(b"float32", 4)),
    "a tensor with too few": record(tensor(b"float32", 4), bytes(15)),
    "a tensor with too many": record(tensor(b"float32", 4), bytes(17)),
    "an exabyte": record(tensor(b"uint8", 2**60)),
    "an overflow": record(tensor(b"float64", 2**62, 2**62)),
    "an overflow beside a zero": record(tensor(b"float64", 0, 2**62, 2**62)),
    "65 dimensions": record(tensor(b"uint8", *[1] * 65), b"x"),
    "numpy objects": record(array(b"|O", 1), bytes(8)),
    "numpy without bytes": record(array(b"|V0", 2**40)),
    "numpy of a wild size": record(array(b"|V2147483647", 1)),
    "numpy of no dtype": record(array(b"cheese", 1), b"x"),
    "numpy dtype by code": record(array(b"i4,(2,)f8", 2**50)),
    "numpy dtype of None": record(b"nN" + U64.pack(0)),
    "numpy dtype of a dict": record(b"nd" + U64.pack(0) + U64.pack(0)),
    "numpy fields of numbers": record(b"nl" + U64.pack(1) + b"u" + U64.pack(1) + b"N" + U64.pack(0)),
    "numpy exabyte": record(array(b"<f8", 2**57)),
    "numpy overflow beside a zero": record(array(b"<f8", 0, 2**62, 2**62)),
    "a scalar too short": record(b"g" + text(b"<f8") + U64.pack(4) + bytes(4)),
    "a scalar of objects": record(b"g" + text(b"|O") + U64.pack(8) + bytes(8)),
    "a numpy str of no character": record(b"g" + text(b"<U1") + U64.pack(4) + b"\xff\xff\xff\x7f"),
    "deep": record((b"l" + U64.pack(1)) * 200 + b"N"),
    "very deep": record((b"l" + U64.pack(1)) * 200_000 + b"N"),
    "deep keys": record((b"u" + U64.pack(1)) * 200_000 + b"N"),
}


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused_in_little_memory(name: str) -> None:
    data = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="stored sample"):
            codec.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_every_truncation_is_refused() -> None:  # F7
    for length in range(len(RECORD)):
        with pytest.raises(IntegrityError):
            codec.decode(RECORD[:length])


def test_every_truncation_that_tells_its_length_is_refused() -> None:
    for length in range(24, len(RECORD)):
        cut = bytearray(RECORD[:length])
        struct.pack_into("<Q", cut, 16, length)
        with pytest.raises(IntegrityError):
            codec.decode(bytes(cut))


def outcome(data: bytes) -> Any:
    """What decoding gives; only the two errors it names may come out."""
    try:
        return codec.decode(data)
    except (IntegrityError, ConfigurationError) as error:
        return error


@given(st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=400)
def test_damage_anywhere_is_refused_or_another_value(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(RECORD)
    for at, value in changes:
        damaged[at] = value
    outcome(bytes(damaged))


@given(st.binary(max_size=300))
@settings(max_examples=400)
def test_any_tree_is_refused_or_a_value(tree: bytes) -> None:
    outcome(record(tree))


_NODES = st.sampled_from([b"N", b"l", b"u", b"d", b"r", b"a", b"t", b"n", b"g", b"s", b"I", b"f", b"c"])
_PARTS = (
    _NODES
    | st.integers(0, 3).map(U64.pack)
    | st.integers(0, 2**64 - 1).map(U64.pack)
    | st.sampled_from([b"uint8", b"<f8", b"|V0", b"<U1", b"tests.unit.sample_classes:Point", b"x"]).map(text)
)


@example(b"nu" + bytes(8), b"")  # an empty tuple where a dtype should stand
@given(st.lists(_PARTS, max_size=30).map(b"".join), st.binary(max_size=64))
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
def test_trees_of_likely_parts_are_refused_or_values(tree: bytes, leaves: bytes) -> None:
    outcome(record(tree, leaves))
