"""Stock `.metadata`: torch's own is read, whatever version of it; anything else is refused and never executed."""

from __future__ import annotations

import builtins
import os
import pickle
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from torchcache.checkpoint.location import checkpoint_uri
from torchcache.checkpoint.metadata import dtype_of, load_metadata, stock_metadata
from torchcache.errors import CheckpointError, IntegrityError


def stock(**changes: Any) -> Metadata:
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(
                TensorProperties(torch.bfloat16, memory_format=torch.preserve_format),
                torch.Size([4, 2]),
                [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2]))],
            ),
            "step": BytesStorageMetadata(),
        },
        "planner_data": OrderedDict(w=("model", 0, "w")),
        "storage_data": {
            MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 1577),
            MetadataIndex("step"): _StorageInfo("__0_0.distcp", 1577, 10, ["zstd"]),
        },
        "storage_meta": StorageMeta(checkpoint_id=PosixPath("/ckpt/1"), save_id="x", modules=["m"]),
        "version": "1.0.0",
    }
    return Metadata(**{**fields, **changes})


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_stock_metadata_is_read_in_every_protocol(protocol: int) -> None:
    loaded = load_metadata(pickle.dumps(stock(), protocol=protocol), where="x")
    assert loaded.state_dict_metadata == stock().state_dict_metadata
    assert loaded.planner_data == stock().planner_data
    assert loaded.storage_data == stock().storage_data
    assert loaded.storage_meta is not None
    assert str(loaded.storage_meta.checkpoint_id) == "/ckpt/1"


class Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Mine:
    pass


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize(
    "hidden",
    [
        {"planner_data": "evil"},
        {"state_dict_metadata": {"w": "evil"}},
        {"storage_data": {MetadataIndex("w"): "evil"}},
        {"storage_meta": "evil"},
    ],
    ids=lambda hidden: next(iter(hidden)),
)
def test_code_in_metadata_is_refused_and_not_executed(hidden: dict[str, Any], tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    evil = Evil(os.mkdir, str(witness))
    place = {k: {i: evil for i in v} if isinstance(v, dict) else evil for k, v in hidden.items()}
    with pytest.raises(
        CheckpointError, match=r"s3://b/\.metadata is a pickle that refers to posix\.mkdir.*refused"
    ):
        load_metadata(pickle.dumps(stock(**place)), where="s3://b/.metadata")
    assert not witness.exists()


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize(
    "evil",
    [
        Evil(eval, "1"),
        Evil(exec, "1"),
        Evil(getattr, Metadata, "__init__"),
        Evil(builtins.__import__, "os"),
        Evil(torch.load, "x"),
        Evil(torch.serialization._get_layout, "torch.load"),
        Mine(),
        torch.nn.Linear,
        torch.ones(2),
    ],
    ids=["eval", "exec", "getattr", "import", "torch.load", "layout", "mine", "module", "tensor"],
)
def test_nothing_else_than_stock_content_gets_through(evil: Any) -> None:
    with pytest.raises((CheckpointError, IntegrityError), match="x"):
        load_metadata(pickle.dumps(stock(planner_data=evil)), where="x")


@pytest.mark.hostile("deserialisation")
def test_a_pickle_cannot_change_torchs_classes() -> None:
    """BUILD on a class would set its attributes, for the whole process."""
    opcodes = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"  # the class itself
        b"N}X\x05\x00\x00\x00evilsK\x01s\x86b."  # BUILD with (None, {"evils": 1})
    )
    with pytest.raises(CheckpointError, match="the state of a type"):
        load_metadata(opcodes, where="x")
    assert not hasattr(Metadata, "evils")


@pytest.mark.hostile("deserialisation")
def test_a_pickle_cannot_change_members_of_torchs_enums() -> None:
    """BUILD on a member would change its value, and so what later saves write, for the whole process."""
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    before = member.value
    opcodes = (
        b"\x80\x02cbuiltins\ngetattr\nctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
        b"X\x17\x00\x00\x00TORCH_CONTIGUOUS_FORMAT\x86R}X\x07\x00\x00\x00_value_K\x63sb."
    )
    with pytest.raises(CheckpointError, match="the state of a _MEM_FORMAT_ENCODING"):
        load_metadata(opcodes, where="x")
    assert member.value == before


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"garbage", b"\x80\x04.", pickle.dumps(stock())[:-20]])
def test_damaged_metadata_is_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="x is no readable metadata"):
        load_metadata(data, where="x")


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize(
    "content",
    [
        {"just": "a dict"},
        stock(storage_data=None),
        stock(storage_data={"w": 1}),
        stock(state_dict_metadata=None),
        stock(storage_data={MetadataIndex("w"): _StorageInfo("../../etc/passwd", 0, 1)}),
        stock(storage_data={MetadataIndex("w"): _StorageInfo("/etc/passwd", 0, 1)}),
        stock(storage_data={MetadataIndex("w"): _StorageInfo("a", -1, 1)}),
        stock(storage_data={MetadataIndex("w"): _StorageInfo("a", 0, 1.5)}),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense_is_refused(content: object) -> None:
    with pytest.raises(IntegrityError, match="x is not the metadata of a checkpoint"):
        load_metadata(pickle.dumps(content), where="x")


def test_classes_declared_safe_to_torch_are_allowed() -> None:
    data = pickle.dumps(stock(planner_data=Mine()))
    with pytest.raises(CheckpointError, match="add_safe_globals"):
        load_metadata(data, where="x")
    with torch.serialization.safe_globals([Mine]):
        assert isinstance(load_metadata(data, where="x").planner_data, Mine)


def test_a_dtype_this_torch_lacks_says_so() -> None:
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(CheckpointError, match=r"dtype 'float3'.*newer torch"):
        dtype_of("float3")
    with pytest.raises(CheckpointError):
        dtype_of("load")


_TWICE = b")" + b"2\x86" * 60  # a tuple of the same tuple twice, sixty deep: 2 ** 60 parts to hash
_DEEP = b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...


@pytest.mark.hostile("deserialisation")
@pytest.mark.parametrize("key", [_TWICE, _DEEP], ids=["twice", "deep"])
@pytest.mark.parametrize(
    "pickled",
    [
        b"}%bNs",  # SETITEM
        b"}(%bNu",  # SETITEMS
        b"\x8f(%b\x90",  # ADDITEMS to a set
        b"(%b\x91",  # FROZENSET
        b"(%bNd",  # DICT
        b"cbuiltins\nset\n(](%be\x85R",  # set([...])
        b"cbuiltins\nset\n(%b\x85tR",
        b"ccollections\nOrderedDict\n](%bN\x86e\x85R",
        b"}ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}(X\x03\x00\x00\x00fqn%bub Ns",
    ],
)
def test_what_takes_forever_to_hash_or_the_whole_stack_is_refused_at_once(pickled: bytes, key: bytes) -> None:
    data = b"\x80\x04" + pickled.replace(b" ", b"").replace(b"%b", key) + b"."
    with pytest.raises((CheckpointError, IntegrityError)):
        load_metadata(data, where="x")


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize(
    "claim",
    [
        b"\x96" + (1 << 62).to_bytes(8, "little"),  # BYTEARRAY8
        b"\x96" + (1 << 36).to_bytes(8, "little"),
        b"\x8e" + (1 << 62).to_bytes(8, "little"),  # BINBYTES8
        b"\x8d" + (1 << 62).to_bytes(8, "little"),  # BINUNICODE8
        b"B" + (1 << 31).to_bytes(4, "little"),  # BINBYTES
        b"\x8b" + (1 << 30).to_bytes(4, "little"),  # LONG4
        b"\x95" + (1 << 62).to_bytes(8, "little"),  # FRAME
        b"r" + (1 << 31).to_bytes(4, "little"),  # LONG_BINPUT
        b"I" + b"9" * 100_000 + b"\n",
        b"(" * 1_000_000,
    ],
)
def test_claims_of_size_get_no_memory(claim: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            load_metadata(b"\x80\x04" + claim + b".", where="x")
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", range(0, 900, 7))
def test_no_truncation_is_taken_for_the_whole(length: int) -> None:
    data = pickle.dumps(stock())
    with pytest.raises((CheckpointError, IntegrityError)):
        load_metadata(data[: min(length, len(data) - 1)], where="x")


@given(st.data())
def test_changed_bytes_give_metadata_or_our_error(data: st.DataObject) -> None:
    pickled = bytearray(pickle.dumps(stock()))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert type(load_metadata(bytes(pickled), where="x")) is Metadata
    except (CheckpointError, IntegrityError):
        pass


@pytest.mark.parametrize("folder", ["/data/run 1/step-5", "s3://bucket/run/step-5"])
def test_metadata_names_a_checkpoint_as_its_user_did(folder: str) -> None:
    uri = checkpoint_uri(folder)
    found = stock_metadata(Metadata({}), [], checkpoint_id=uri, save_id="1")
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == folder
