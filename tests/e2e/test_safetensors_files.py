"""safetensors files through a real pool, from a real S3 and from files: bit for bit what the reference gives."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from torchcache.model import CHUNK_BYTES

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.complex64, torch.bool),
)


@pytest.fixture(scope="module")
def shared(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with environment(s3_server.environment()), tc.LocalPool(tmp_path_factory.mktemp("pool"), "1GB") as pool:
        yield pool


@pytest.fixture
def pool(shared: tc.Pool, s3: SeaweedFS) -> tc.Pool:
    return shared


def content(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern there is, NaNs too."""
    generator = torch.Generator().manual_seed(len(shape))
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator)
    return raw.to(torch.uint8).view(dtype) if dtype != torch.bool else raw % 2 == 0


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].is_contiguous(), name
        if tensor.numel():
            ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(ours, theirs), name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with tensors of all dtypes and odd shapes."""
    tensors = {str(dtype).removeprefix("torch."): content(dtype, 5, 7, 6) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "": torch.ones(1)}
    path = tmp_path_factory.mktemp("mixed") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "who": "Zoë"})
    return path


def test_every_dtype_is_bit_for_bit_that_of_the_reference(pool: tc.Pool, mixed: Path) -> None:
    expected = load_file(mixed)
    assert len(expected) == len(DTYPES) + 3
    assert_equal(tc.load_safetensors(mixed, pool=pool), expected)
    assert_equal(tc.load_safetensors(mixed.parent, pool=pool), expected)


def test_the_file_is_used_as_the_reference_s_is(pool: tc.Pool, mixed: Path) -> None:
    with (
        tc.open_safetensors(str(mixed), pool=pool) as ours,
        safetensors.safe_open(mixed, framework="pt") as theirs,
    ):
        assert ours.keys() == list(theirs.keys())
        assert list(ours) == ours.keys()
        assert len(ours) == len(ours.keys())
        # Empty tensors share their place with what follows.
        assert [n for n in ours.offset_keys() if n != "empty"] == [
            n for n in theirs.offset_keys() if n != "empty"
        ]
        assert ours.metadata() == theirs.metadata() == {"format": "pt", "who": "Zoë"}
        assert "scalar" in ours
        assert "nothing" not in ours
        part = ours.get_slice("bfloat16")
        assert (part.get_shape(), part.get_dtype()) == ([5, 7, 6], "BF16")
        assert_equal({"a": ours.get_tensor("int16")}, {"a": theirs.get_tensor("int16")})
        assert_equal({"a": part[1:3, :, 2]}, {"a": theirs.get_slice("bfloat16")[1:3, :, 2]})
        assert pickle.loads(pickle.dumps(ours)).get_tensor("scalar") == 2.5


def test_wanted_names_come_in_their_order(pool: tc.Pool, mixed: Path) -> None:
    found = tc.load_safetensors(mixed, keys=iter(["uint8", "float64", "uint8"]), pool=pool)
    assert list(found) == ["uint8", "float64"]
    assert tc.load_safetensors(mixed, keys=[], pool=pool) == {}
    with pytest.raises(tc.ConfigurationError, match="like it: float64"):
        tc.load_safetensors(mixed, keys=["float46"], pool=pool)
    with pytest.raises(tc.ConfigurationError, match="as a list"):
        tc.load_safetensors(mixed, keys="float64", pool=pool)


def test_another_device_gets_what_was_fetched(pool: tc.Pool, mixed: Path) -> None:
    found = tc.load_safetensors(mixed, device="meta", pool=pool)
    assert all(tensor.is_meta for tensor in found.values())
    assert found["int64"].shape == (5, 7, 6)


_INDICES = st.one_of(
    st.integers(-3, 3),
    st.builds(slice, *[st.none() | st.integers(-9, 9)] * 2, st.none() | st.integers(1, 4)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=st.sampled_from(["float32", "float8_e4m3fn", "float4_e2m1fn_x2", "bool", "uint64", "complex64"]),
    index=st.lists(_INDICES, max_size=3),
    dots=st.none() | st.integers(0, 3),
)
def test_any_index_gives_what_it_gives_of_the_whole_tensor(
    pool: tc.Pool, mixed: Path, name: str, index: list[Any], dots: int | None
) -> None:
    if dots is not None:
        index.insert(min(dots, len(index)), ...)
    whole = load_file(mixed)[name]
    raw = whole.view(torch.uint8) if whole.itemsize == 1 else whole  # what torch can index of each dtype
    expected = raw[tuple(index)].clone(memory_format=torch.contiguous_format).view(whole.dtype)
    with tc.open_safetensors(mixed, pool=pool) as file:
        assert_equal({"a": file.get_slice(name)[tuple(index)]}, {"a": expected})


@pytest.mark.parametrize(
    "index", [5, -6, (0, 0, 0, 0), (..., ...), [0, 1], None, True, "a", slice(None, None, -1), 1.0]
)
def test_what_is_no_index_is_refused(pool: tc.Pool, mixed: Path, index: Any) -> None:
    with tc.open_safetensors(mixed, pool=pool) as file, pytest.raises(IndexError):
        file.get_slice("float32")[index]


def test_six_bits_an_element_are_more_than_torch_has(pool: tc.Pool, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "six.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    with tc.open_safetensors(path, pool=pool) as file:
        assert file.get_slice("a").get_dtype() == "F6_E2M3"
        with pytest.raises(tc.CheckpointError, match="F6_E2M3, which torch"):
            file.get_tensor("a")


# ---- what is fetched ----


def requests(pool: tc.Pool) -> tuple[int, int]:
    """GETs of bytes to S3 so far, and their bytes."""
    counted = [u for server in pool.status() for u in server.under_stores if u.name == "s3"]
    return sum(u.read_requests for u in counted), sum(u.read_bytes for u in counted)


def test_only_what_is_wanted_is_fetched(pool: tc.Pool, s3: SeaweedFS, tmp_path: Path) -> None:
    megabytes = {f"layer.{i}": torch.full((CHUNK_BYTES // 4,), i, dtype=torch.int32) for i in range(8)}
    save_file(megabytes, tmp_path / "m.safetensors")
    size = (tmp_path / "m.safetensors").stat().st_size
    bucket = s3.make_bucket()
    s3.client.upload_file(str(tmp_path / "m.safetensors"), bucket, "run/m.safetensors")
    uri = f"s3://{bucket}/run/m.safetensors"
    gets, fetched = requests(pool)
    with tc.open_safetensors(uri, pool=pool) as file:
        assert len(file.keys()) == 8
        # The header is the first chunk's.
        assert requests(pool) == (gets + 1, fetched + CHUNK_BYTES)
        found = file.get_tensors(["layer.5", "layer.6"])
        assert found["layer.5"].eq(5).all()
        assert found["layer.6"].eq(6).all()
        # Two tensors of a chunk's size lie in three chunks, each fetched once.
        assert requests(pool) == (gets + 4, fetched + 4 * CHUNK_BYTES)
        assert file.get_slice("layer.2")[10:20].eq(2).all()
        assert requests(pool) == (gets + 5, fetched + 5 * CHUNK_BYTES)
    assert_equal(tc.load_safetensors(uri, pool=pool), megabytes)
    chunks = -(-size // CHUNK_BYTES)
    assert requests(pool) == (gets + chunks, fetched + size)


def _load(pool: tc.Pool, uri: str, barrier: Any, results: Any) -> None:
    try:
        torch.set_num_threads(1)  # as DataLoader's workers do: torch's own threads don't survive a fork
        barrier.wait(120)
        found = tc.load_safetensors(uri, pool=pool)
        results.put(int(sum(t.view(torch.int32).to(torch.int64).sum() for t in found.values())))
    except BaseException as error:
        results.put(repr(error))
        raise


@pytest.mark.forks
def test_processes_that_load_at_once_cost_one_fetch(pool: tc.Pool, s3: SeaweedFS, tmp_path: Path) -> None:
    """A sharded model of 40 MB, loaded by three processes at the same time."""
    bucket = s3.make_bucket()
    tensors, weight_map = {}, {}
    sizes = []
    for shard in range(2):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        of_shard = {
            f"s{shard}.{i}": torch.randint(0, 1000, (1_300_000,), dtype=torch.int32) for i in range(4)
        }
        save_file(of_shard, tmp_path / name)
        s3.client.upload_file(str(tmp_path / name), bucket, f"llm/{name}")
        sizes.append((tmp_path / name).stat().st_size)
        tensors |= of_shard
        weight_map |= dict.fromkeys(of_shard, name)
    index = json.dumps({"metadata": {"total_size": 7}, "weight_map": weight_map}).encode()
    s3.client.put_object(Bucket=bucket, Key="llm/model.safetensors.index.json", Body=index)
    expected = int(sum(t.to(torch.int64).sum() for t in tensors.values()))

    gets, fetched = requests(pool)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_load, args=(pool, f"s3://{bucket}/llm", barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in range(3)] == [expected] * 3
    for process in processes:
        process.join(60)
    chunks = sum(-(-size // CHUNK_BYTES) for size in sizes) + 1
    assert requests(pool) == (gets + chunks, fetched + sum(sizes) + len(index))

    with tc.open_safetensors(f"s3://{bucket}/llm/model.safetensors.index.json", pool=pool) as file:
        assert file.metadata() == {"total_size": 7}
        assert file.keys() == sorted(tensors)
        assert set(file.offset_keys()) == set(tensors)
        assert_equal(file.get_tensors(), tensors)


# ---- what is wrong ----


def test_a_checkpoint_that_is_not_there(pool: tc.Pool, tmp_path: Path) -> None:
    with pytest.raises(tc.ObjectNotFound):
        tc.load_safetensors(tmp_path / "m.safetensors", pool=pool)
    with pytest.raises(
        tc.ObjectNotFound, match=r"neither model.safetensors.index.json nor model.safetensors; name the file"
    ):
        tc.open_safetensors(tmp_path, pool=pool)


def test_an_index_that_is_wrong(pool: tc.Pool, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    outside = tmp_path / "outside.safetensors"
    save_file({"secret": torch.ones(3)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"

    def load(weight_map: dict[str, str]) -> dict[str, torch.Tensor]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        os.utime(
            index, ns=(time.time_ns(),) * 2
        )  # another version even where the clock is too coarse to tell
        return tc.load_safetensors(index, pool=pool)

    assert load({"a": "one.safetensors"})["a"].tolist() == [1, 1, 1]
    with pytest.raises(tc.IntegrityError, match=r"'b' lies in one\.safetensors, and it does not"):
        load({"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(tc.ObjectNotFound, match=r"two\.safetensors"):
        load({"a": "one.safetensors", "b": "two.safetensors"})
    for way in ("../outside.safetensors", str(outside), f"file://{outside}"):
        with pytest.raises(tc.IntegrityError, match="no sound index"):
            load({"a": "one.safetensors", "secret": way})


def test_a_file_that_is_no_checkpoint(pool: tc.Pool, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for data, problem in [
        (b"", "only 0 bytes"),
        (b"PK\3\4 something else entirely", "claims a header"),
        (b"\xff" * 8, "claims a header"),
        ((20).to_bytes(8, "little") + b"{}", "the whole file has 10"),
    ]:
        path.write_bytes(data)
        with pytest.raises(tc.IntegrityError, match=problem):
            tc.load_safetensors(path, pool=pool)


def test_a_header_larger_than_the_first_read(pool: tc.Pool, tmp_path: Path) -> None:
    many = {f"model.layers.{i}.self_attn.q_proj.weight": torch.full((2,), float(i)) for i in range(4000)}
    save_file(many, tmp_path / "many.safetensors")
    header = int.from_bytes((tmp_path / "many.safetensors").read_bytes()[:8], "little")
    assert header > 256 * 1024
    assert_equal(tc.load_safetensors(tmp_path / "many.safetensors", pool=pool), many)


def test_a_file_that_changes_is_named(pool: tc.Pool, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    large = {"a": torch.zeros(CHUNK_BYTES // 4), "b": torch.zeros(CHUNK_BYTES // 4)}
    save_file(large, path)
    with tc.open_safetensors(path, pool=pool) as file:
        save_file({"a": large["a"] + 1, "b": large["b"] + 1}, path)
        with pytest.raises(tc.ObjectChanged, match=r"m\.safetensors"):
            file.get_tensor("b")
    assert tc.load_safetensors(path, pool=pool)["b"].eq(1).all()
