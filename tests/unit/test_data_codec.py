"""The typed encoding: everything it takes comes back equal, of the same type, and owned by the reader."""

from __future__ import annotations

import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import default_collate

from tests.unit.sample_classes import (
    Box,
    Colour,
    Content,
    Derived,
    Frozen,
    Outer,
    Overlong,
    Pair,
    Point,
    TupleChild,
)
from torchcache.data import codec
from torchcache.data.leaves import DTYPES
from torchcache.errors import ConfigurationError, UnsupportedSample


def equal(a: Any, b: Any) -> bool:
    """Equal values of equal types all the way down; NaNs are equal, tensors and arrays by dtype, shape and bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(equal, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, complex):
        return equal(a.real, b.real) and equal(a.imag, b.imag)
    if hasattr(a, "__dataclass_fields__"):
        return all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return bool(a == b)


def raw(tensor: torch.Tensor) -> bytes:
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return tensor.view(carrier[tensor.element_size()]).contiguous().numpy().tobytes()


def both_ways(sample: Any) -> list[Any]:
    """The sample decoded from a buffer that the reader owns, and from a read-only one."""
    record = codec.encode(sample)
    return [codec.decode(record), codec.decode(bytes(record))]


def test_dtypes_are_all_of_torchs_but_the_quantized() -> None:
    names = {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert names - set(DTYPES) == {"quint8", "qint8", "qint32", "quint4x2", "quint2x4"}
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2", "complex32", "complex128", "bool", "uint64"} <= set(
        DTYPES
    )


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    count = math.prod(shape) * dtype.itemsize
    values = (
        torch.arange(count, dtype=torch.uint8) % 2
        if name == "bool"
        else torch.arange(count, dtype=torch.uint8)
    )
    tensor = values.view(dtype).reshape(shape)
    for decoded in both_ways(tensor):
        assert equal(decoded, tensor)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_tensors_that_are_not_contiguous(name: str) -> None:
    dtype = DTYPES[name]
    count = 6 * dtype.itemsize
    tensor = (torch.arange(count, dtype=torch.uint8) % 2).view(dtype).reshape(2, 3).t()
    assert not tensor.is_contiguous()
    for decoded in both_ways(tensor):
        assert equal(decoded, tensor)


def test_views_lazy_conjugates_and_expanded_tensors() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (z.conj(), z.conj().imag, torch.arange(100)[10:90:7], torch.ones(1).expand(3, 4)):
        for decoded in both_ways(tensor):
            assert torch.equal(decoded, tensor)
            assert len(codec.encode(tensor)) < 300  # the view, not what lies behind it


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=[]))
    | st.binary(max_size=100)
)
_KEYS = st.text(max_size=8) | st.integers() | st.booleans() | st.none() | st.binary(max_size=8)
_TENSORS = st.builds(
    lambda dtype, shape: (
        torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(shape)
    ),
    st.sampled_from(sorted(DTYPES.values(), key=str)),
    st.lists(st.integers(1, 4), max_size=3),
)
_ARRAYS = hnp.arrays(
    hnp.scalar_dtypes() | hnp.array_dtypes(allow_subarrays=True),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
).filter(lambda array: array.dtype.itemsize > 0)
SAMPLES = st.recursive(
    _SCALARS | _TENSORS | _ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_KEYS, inner, max_size=4)
        | st.builds(Box, inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Frozen, inner)
        | st.builds(Outer.Inner, inner)
    ),
    max_leaves=12,
)


@given(SAMPLES)
def test_what_is_encoded_comes_back(sample: Any) -> None:
    for decoded in both_ways(sample):
        assert equal(decoded, sample)


@given(SAMPLES)
def test_equal_samples_have_equal_records(sample: Any) -> None:
    assert bytes(codec.encode(sample)) == bytes(codec.encode(sample))


@pytest.mark.parametrize(
    "array",
    [
        np.array("2026-01-01", dtype="M8[ns]"),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([(1, 2.5)], dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        np.array(["añ", "b"]),
        np.float32(1.5),
        np.str_(""),
        np.str_("x"),
        np.bool_(True),
        np.datetime64("2026-01-01"),
    ],
    ids=repr,
)
def test_numpy(array: Any) -> None:
    for decoded in both_ways(array):
        assert equal(
            decoded, np.ascontiguousarray(array) if isinstance(array, np.ndarray) and array.ndim else array
        )


def test_a_mapped_array_is_stored_as_a_plain_one(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "a", dtype=np.int16, mode="w+", shape=(5,))
    mapped[:] = range(5)
    for decoded in both_ways(mapped[1:4]):
        assert type(decoded) is np.ndarray
        assert decoded.tolist() == [1, 2, 3]


def test_what_is_decoded_is_writable_and_nobody_elses() -> None:
    record = bytes(codec.encode([torch.zeros(100), np.zeros(100)]))
    before = bytes(record)
    tensor, array = codec.decode(memoryview(record))  # type: ignore[misc]
    tensor.fill_(7)
    array[:] = 7
    assert record == before


def test_an_owned_record_is_decoded_without_a_copy_and_aligned() -> None:
    record = codec.encode({"a": b"x", "t": torch.arange(10), "n": np.arange(3), "u": torch.ones(5)})
    sample: Any = codec.decode(record)
    start = np.frombuffer(record, np.uint8).__array_interface__["data"][0]
    for address in (
        sample["t"].data_ptr(),
        sample["u"].data_ptr(),
        sample["n"].__array_interface__["data"][0],
    ):
        assert start < address < start + len(record)
        assert address % 64 == 0


def test_a_record_that_lies_askew_is_copied() -> None:
    record = codec.encode(torch.arange(4))
    askew = memoryview(bytearray(len(record) + 64))
    offset = next(
        o for o in range(64) if np.frombuffer(askew[o:], np.uint8).__array_interface__["data"][0] % 64 == 4
    )
    askew[offset : offset + len(record)] = record
    decoded: Any = codec.decode(askew[offset : offset + len(record)])
    askew[:] = bytes(len(askew))
    assert decoded.tolist() == [0, 1, 2, 3]


def test_default_collate_takes_it() -> None:
    samples = [{"image": torch.ones(3, 2) * i, "mask": np.zeros(2), "label": i} for i in range(4)]
    records = [bytes(codec.encode(s)) for s in samples]
    batch = default_collate([codec.decode(r) for r in records])  # warnings are errors here
    assert batch["image"].shape == (4, 3, 2)
    assert batch["label"].tolist() == [0, 1, 2, 3]


def deep(levels: int) -> Any:
    sample: Any = 1
    for _ in range(levels):
        sample = [sample]
    return sample


def itself() -> Any:
    sample: list[Any] = []
    sample.append(sample)
    return sample


@pytest.mark.parametrize(
    ("sample", "path", "reason"),
    [
        ({"a": [1, (2, object())]}, "sample['a'][1][1]", "is a object"),
        ({"set": {1}}, "sample['set']", "is a set"),
        ([OrderedDict()], "sample[0]", "collections.OrderedDict"),
        (Point(1, Box(lambda: 0)), "sample.tags.x", "is a function"),
        ({"c": Colour.RED}, "sample['c']", "Colour"),
        ({"p": Path("x")}, "sample['p']", "PosixPath"),
        ({"t": TupleChild()}, "sample['t']", "TupleChild"),
        ({"d": Derived(2)}, "sample['d']", "attributes besides its fields, which would be lost: twice"),
        ({"p": Overlong(1, 2, 3)}, "sample['p']", "3 items for 2 fields"),
        ({"d": Content(2)}, "sample['d']", "container"),
        ({(1, frozenset()): 1}, "sample", "key of type tuple"),
        ({"t": torch.nn.Parameter(torch.ones(1))}, "sample['t']", "Parameter"),
        ({"t": torch.ones(1, requires_grad=True)}, "sample['t']", "detach"),
        ({"t": torch.ones(2).to_sparse()}, "sample['t']", "sparse"),
        ({"t": torch.empty(1, device="meta")}, "sample['t']", "lies on meta"),
        ({"n": np.array([object()])}, "sample['n']", "Python objects"),
        ({"n": np.ma.masked_array([1])}, "sample['n']", "MaskedArray"),
        ({"n": np.zeros(3, np.dtype([]))}, "sample['n']", "no bytes"),
        (deep(101), "[0][0][0]", "levels deep"),
        (itself(), "[0][0][0]", "contain itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_form_is_named_by_its_path(sample: Any, path: str, reason: str) -> None:
    with pytest.raises(UnsupportedSample) as caught:
        codec.encode(sample)
    assert isinstance(caught.value, TypeError)
    assert path + " " in str(caught.value)
    assert reason in str(caught.value)
    assert "encode= and decode=" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_as_deep_as_allowed_comes_back() -> None:
    assert codec.decode(codec.encode(deep(100))) == deep(100)


def test_a_class_within_a_function_can_not_be_found_again() -> None:
    from dataclasses import dataclass

    @dataclass
    class Local:
        x: int

    with pytest.raises(UnsupportedSample, match="define it at the top level of a module"):
        codec.encode(Local(1))


def test_decoding_runs_no_code_of_the_class() -> None:
    plain = codec.encode(Frozen("accepted"))
    record = bytes(plain).replace(b"accepted", b"refused!")
    assert codec.decode(record).value == "refused!"  # type: ignore[attr-defined]
    record = bytes(codec.encode(Frozen("refusef"))).replace(b"refusef", b"refused")
    assert codec.decode(record).value == "refused"  # type: ignore[attr-defined]


@pytest.fixture
def far_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("far_module")
    monkeypatch.setitem(sys.modules, "far_module", module)
    exec(
        "import dataclasses, typing\n"
        "@dataclasses.dataclass\nclass Thing:\n    x: int\n"
        "class Named(typing.NamedTuple):\n    x: int\n",
        vars(module),
    )
    return module


@pytest.mark.parametrize("name", ["Thing", "Named"])
def test_a_class_is_only_found_where_it_was_imported(
    name: str, far_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = bytes(codec.encode(getattr(far_module, name)(1)))
    monkeypatch.delitem(sys.modules, "far_module")
    with pytest.raises(ConfigurationError, match="import far_module before reading") as caught:
        codec.decode(record)
    assert "not imported in this process" in str(caught.value)
    monkeypatch.setitem(sys.modules, "far_module", ModuleType("far_module"))
    with pytest.raises(ConfigurationError, match=f"has no class {name}"):
        codec.decode(record)


@pytest.mark.parametrize("name", ["Thing", "Named"])
def test_a_class_that_changed_is_refused(name: str, far_module: ModuleType) -> None:
    record = bytes(codec.encode(getattr(far_module, name)(1)))
    exec(
        "@dataclasses.dataclass\nclass Thing:\n    x: int\n    y: int\n"
        "class Named(typing.NamedTuple):\n    y: int\n",
        vars(far_module),
    )
    with pytest.raises(ConfigurationError, match="another version="):
        codec.decode(record)
    setattr(far_module, name, int)
    with pytest.raises(ConfigurationError, match=f"far_module.{name} is no"):
        codec.decode(record)


def test_finding_a_class_imports_nothing(far_module: ModuleType) -> None:
    record = bytes(codec.encode(far_module.Thing(1)))
    del far_module.Thing
    far_module.__getattr__ = lambda name: pytest.fail("asked the module for it")  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="has no class Thing"):
        codec.decode(record)


@pytest.mark.parametrize("data", [b"", b"x", bytearray(b"abc" * 100), memoryview(b"12")])
def test_the_users_own_encoding(data: bytes | bytearray | memoryview) -> None:
    record = codec.encode_custom(data)
    assert codec.decode_custom(record) == data
    assert codec.decode_custom(record).readonly


@pytest.mark.parametrize("data", ["text", 5, None, [1], memoryview(b"1234")[::2]])
def test_the_users_own_encoding_must_give_bytes(data: Any) -> None:
    with pytest.raises(ConfigurationError, match="encode= must return bytes"):
        codec.encode_custom(data)


def test_records_of_one_kind_are_not_read_as_the_other() -> None:
    with pytest.raises(ConfigurationError, match="stored with encode=, and are read without"):
        codec.decode(codec.encode_custom(b"x"))
    with pytest.raises(ConfigurationError, match="stored without encode=, and are read with encode="):
        codec.decode_custom(codec.encode(b"x"))
