"""Headers and indices of safetensors files: what the reference takes is taken, what is wrong or hostile is refused."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from torchcache.checkpoint.safetensors_header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    header_end,
    parse_header,
    parse_index,
)
from torchcache.errors import IntegrityError

WHERE = "s3://bucket/model.safetensors"


def tensor(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def parse(header: object, data_bytes: int) -> Any:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(encoded, 8 + len(encoded) + data_bytes, where=WHERE)


def reference_takes(header: bytes, data_bytes: int) -> bool:
    try:
        safetensors.deserialize(struct.pack("<Q", len(header)) + header + bytes(data_bytes))
    except safetensors.SafetensorError:
        return False
    return True


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = parse(
        {"b": tensor(0, 8, [2], "F32"), "__metadata__": {"format": "pt"}, "a": tensor(8, 10)}, data_bytes=10
    )
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["b", "a"]
    b, a = header.tensors.values()
    assert (b.dtype, b.shape, b.bytes.length) == ("F32", (2,), 8)
    assert a.bytes.start == b.bytes.end


def test_nothing_and_padding_and_empty_tensors_are_good() -> None:
    assert parse({}, 0).tensors == {}
    assert list(parse(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"new":1}}   ', 1).tensors) == ["a"]
    empty = parse({"e": tensor(0, 0, [0, 5]), "a": tensor(0, 4), "z": tensor(4, 4, [0])}, 4)
    assert {name: entry.shape for name, entry in empty.tensors.items()} == {"e": (0, 5), "a": (4,), "z": (0,)}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_the_reference_gives_it(dtype: str) -> None:
    size = DTYPE_BITS[dtype]  # of eight elements, in bytes
    good = json.dumps({"a": tensor(0, size, [8], dtype)}).encode()
    assert reference_takes(good, size)
    assert parse(good, size).tensors["a"].dtype == dtype
    bad = json.dumps({"a": tensor(0, size + 1, [8], dtype)}).encode()
    assert not reference_takes(bad, size + 1)
    with pytest.raises(IntegrityError, match="not what"):
        parse(bad, size + 1)


HOSTILE: dict[str, tuple[object, int, str]] = {
    "a tail that belongs to nobody": ({"a": tensor(0, 4)}, 5, "belong to no tensor"),
    "beyond the end": ({"a": tensor(0, 4)}, 3, "beyond the end"),
    "far beyond the end": ({"a": tensor(0, 1 << 61)}, 4, "beyond the end|larger than anything"),
    "a gap in front": ({"a": tensor(1, 5)}, 5, "gap"),
    "a gap between": ({"a": tensor(0, 2), "b": tensor(3, 6)}, 6, "gap"),
    "overlap": ({"a": tensor(0, 4), "b": tensor(2, 6)}, 6, "overlap"),
    "the same bytes twice": ({"a": tensor(0, 4), "b": tensor(0, 4)}, 4, "overlap"),
    "backwards": ({"a": tensor(4, 0, [4])}, 4, "gap|ends before"),
    "negative": ({"a": tensor(-4, 0, [4])}, 0, "where a count should"),
    "too few bytes for the shape": ({"a": tensor(0, 4, [2], "F32")}, 4, "not what F32"),
    "too many": ({"a": tensor(0, 4, [3])}, 4, "not what U8"),
    "none for something": ({"a": tensor(0, 0, [3])}, 0, "not what U8"),
    "half a byte": ({"a": tensor(0, 1, [1], "F4")}, 1, "within a byte"),
    "a shape that overflows": ({"a": tensor(0, 4, [1 << 40, 1 << 40])}, 4, "larger than anything"),
    "one that would with a zero behind": ({"a": tensor(0, 0, [1 << 61, 1 << 61, 0])}, 0, "larger"),
    "a dimension of 300 digits": ({"a": tensor(0, 4, [10**300])}, 4, "where a count should"),
    "a dimension of 5000 digits": (
        b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,1]}}' % (b"9" * 5000),
        1,
        "no sound",
    ),
    "a fraction": ({"a": tensor(0, 4, [4.0])}, 4, "where a count should"),
    "a truth": ({"a": tensor(0, 4, [True, 4])}, 4, "where a count should"),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', 1, "NaN"),
    "an unknown dtype": ({"a": tensor(0, 4, dtype="F128")}, 4, "F128"),
    "a dtype that is a list": (
        {"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}},
        4,
        "described",
    ),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, 4, "described"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "described"),
    "a number for a tensor": ({"a": 7}, 0, "described"),
    "a list": ([], 0, "no JSON object"),
    "a tensor at the top": (tensor(0, 4), 4, "no JSON object"),
    "a text": ('"text"', 0, "no JSON object"),
    "not JSON": (b"{", 0, "no sound"),
    "not UTF-8": (b'{"\xff":1}', 0, "no sound"),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "no sound"),
    "nothing": (b"", 0, "no sound"),
    "a name twice": (
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        4,
        "twice",
    ),
    "a field twice": (
        b'{"a":{"dtype":"U8","shape":[9],"shape":[4],"data_offsets":[0,4]}}',
        4,
        "twice",
    ),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, 0, "__metadata__"),
    "metadata that is a tensor": ({"__metadata__": tensor(0, 4)}, 4, "__metadata__"),
    "deep": (b'{"a":' + b"[" * 100_000, 0, "nested too deeply"),
    "a hundred dimensions": ({"a": tensor(0, 1, [1] * 100)}, 1, "100 dimensions"),
}


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_refused(name: str) -> None:
    header, data_bytes, problem = HOSTILE[name]
    with pytest.raises(IntegrityError, match=problem) as raised:
        parse(header, data_bytes)
    assert raised.value.object == WHERE
    assert WHERE in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize(
    ("start", "size", "problem"),
    [
        (b"", 0, "only 0 bytes"),
        (b"\1\0\0", 3, "only 3 bytes"),
        (struct.pack("<Q", 3), 10, "the whole file has 10"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), 1 << 40, "claims a header"),
        (struct.pack("<Q", (1 << 64) - 1), 1 << 40, "claims a header"),
        (struct.pack("<Q", 1 << 63), 1 << 40, "claims a header"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_anything_is_read(
    start: bytes, size: int, problem: str
) -> None:
    with pytest.raises(IntegrityError, match=problem):
        header_end(start, size, where=WHERE)


def test_the_largest_length_is_taken() -> None:
    start = struct.pack("<Q", MAX_HEADER_BYTES)
    assert header_end(start, MAX_HEADER_BYTES + 8, where=WHERE) == MAX_HEADER_BYTES + 8


@given(st.lists(st.tuples(st.sampled_from(["U8", "F32", "I64"]), st.integers(0, 3)), max_size=5), st.data())
def test_what_is_taken_the_reference_takes_too(tensors: list[tuple[str, int]], data: st.DataObject) -> None:
    """Sound headers are read; one number or name of them changed is judged as the reference judges it."""
    header: dict[str, Any] = {}
    end = 0
    for number, (dtype, count) in enumerate(tensors):
        size = count * DTYPE_BITS[dtype] // 8
        header[f"t{number}"] = tensor(end, end + size, [count], dtype)
        end += size
    assert len(parse(header, end).tensors) == len(tensors)
    if not tensors:
        return
    victim = header[data.draw(st.sampled_from(sorted(header)))]
    field = data.draw(st.sampled_from(["start", "end", "shape", "dtype"]))
    if field == "dtype":
        victim["dtype"] = data.draw(st.sampled_from(["U8", "F32", "F4", "Q1", ""]))
    elif field == "shape":
        victim["shape"] = data.draw(st.lists(st.integers(-1, 4), max_size=2))
    else:
        victim["data_offsets"][field == "end"] += data.draw(st.integers(-9, 9))
    changed = json.dumps(header).encode()
    try:
        parse(changed, end)
        taken = True
    except IntegrityError:
        taken = False
    assert taken == reference_takes(changed, end)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for parsing in (lambda: parse(data, 4), lambda: parse_index(data, where=WHERE)):
        try:
            parsing()
        except IntegrityError:
            pass


_MILLION = """
import resource, sys
from torchcache.checkpoint.safetensors_header import parse_header
from torchcache.errors import IntegrityError
count = 1_000_000
row = '"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
header = ("{" + ",".join(row % (i, i, i + 1) for i in range(count)) + "}").encode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    parse_header(header, 8 + len(header) + count, where="x")
except IntegrityError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.hostile("bombs")
def test_a_million_tensors_are_refused_without_memory_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", _MILLION], capture_output=True, text=True, check=True)
    more_kib, problem = done.stdout.split(" ", 1)
    assert f"more than {MAX_TENSORS} tensors" in problem
    assert int(more_kib) < 16 * 1024


def test_as_many_as_are_allowed_fit_a_bounded_memory() -> None:
    row = '"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    encoded = ("{" + ",".join(row % (i, i, i + 1) for i in range(MAX_TENSORS)) + "}").encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = parse(encoded, MAX_TENSORS)
    assert len(header.tensors) == MAX_TENSORS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def index(files: dict[str, object], **more: object) -> bytes:
    return json.dumps({"weight_map": files, **more}).encode()


def test_an_index_names_files_beside_it() -> None:
    found = parse_index(
        index({"a": "model-1.safetensors", "b": "parts/model-2.safetensors"}, metadata={"total_size": 7}),
        where=WHERE,
    )
    assert found.files == {"a": "model-1.safetensors", "b": "parts/model-2.safetensors"}
    assert found.metadata == {"total_size": 7}
    assert parse_index(index({}, metadata=None), where=WHERE).files == {}


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize(
    "file",
    [
        "../other/model.safetensors",
        "a/../../model.safetensors",
        "/etc/model.safetensors",
        "//host/model.safetensors",
        "s3://other/model.safetensors",
        "https://host/model.safetensors",
        "file:///etc/model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "./model.safetensors",
        "a//model.safetensors",
        "model\0.safetensors",
        "\ud800.safetensors",
        "..",
        "",
        ".metadata",
        "pytorch_model.bin",
        "n" * 2000 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere_is_refused(file: object) -> None:
    with pytest.raises(IntegrityError):
        parse_index(index({"good": "model.safetensors", "bad": file}), where=WHERE)


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}',
        b'{"weight_map": {}, "metadata": [1]}',
        b'{"weight_map": ' + b"[" * 100_000,
        b'{"weight_map": {}, "n": Infinity}',
    ],
)
def test_a_senseless_index_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="no sound index"):
        parse_index(data, where=WHERE)
