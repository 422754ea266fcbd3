"""Checkpoints of one process through a real pool to a real S3 and to files: stock there, refused when wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e.throwaway import throwaway
from tests.unit.checkpoint_states import assert_same, blank, state
from tests.unit.test_checkpoint_reader import Evil
from tests.waiting import until
from torchcache.checkpoint.catalog import list_checkpoints
from torchcache.checkpoint.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def shared(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    root = tmp_path_factory.mktemp("pool")
    with environment(s3_server.environment()), throwaway(tc.LocalPool(root, "1GB"), root) as pool:
        yield pool


@pytest.fixture
def pool(shared: tc.Pool, s3: SeaweedFS) -> tc.Pool:
    return shared


@pytest.fixture
def other_pool(s3: SeaweedFS, tmp_path: Path) -> Iterator[tc.Pool]:
    """A pool that holds nothing: another machine, or this one after its disk was emptied."""
    with tc.LocalPool(tmp_path / "other", "300MB") as pool:
        yield pool


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    return s3.make_bucket()


def save(pool: tc.Pool, uri: Any, content: dict[str, Any], **options: Any) -> None:
    dcp.save(content, storage_writer=tc.CacheStorageWriter(uri, pool=pool, **options))


def load(pool: tc.Pool, uri: Any, content: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = blank(content)
    dcp.load(loaded, storage_reader=tc.CacheStorageReader(uri, pool=pool))
    return loaded


def keys(s3: SeaweedFS, bucket: str) -> list[str]:
    return [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def download(s3: SeaweedFS, bucket: str, prefix: str, folder: Path) -> Path:
    folder.mkdir()
    for key in keys(s3, bucket):
        if key.startswith(prefix):
            s3.client.download_file(bucket, key, str(folder / key.removeprefix(prefix)))
    return folder


def upload(s3: SeaweedFS, bucket: str, prefix: str, folder: Path) -> None:
    for file in folder.iterdir():
        s3.client.upload_file(str(file), bucket, prefix + file.name)


def failure(raised: pytest.ExceptionInfo[dcp.CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


def test_what_lies_in_s3_is_a_stock_checkpoint(
    pool: tc.Pool, s3: SeaweedFS, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}/run/step-1"
    save(pool, uri, state())
    assert_same(load(pool, uri, state()), state())  # from the pool, wherever the upload is by now
    until(lambda: pool.get_save(*pool.resolve(uri)).state == "durable")
    names = [".metadata", ".torchcache.json", "__0_0.distcp"]
    # Durable is said as soon as it is; the claim on the path goes right after.
    until(lambda: keys(s3, bucket) == [f"run/step-1/{name}" for name in names])
    folder = download(s3, bucket, "run/step-1/", tmp_path / "down")
    loaded = blank(state())
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder))
    assert_same(loaded, state())


def test_another_pool_loads_by_the_manifest_and_without_it_as_stock(
    pool: tc.Pool, other_pool: tc.Pool, s3: SeaweedFS, bucket: str
) -> None:
    uri = f"s3://{bucket}/step-1"
    save(pool, uri, state(), durability="store")
    assert_same(load(other_pool, uri, state()), state())
    s3.client.delete_object(Bucket=bucket, Key="step-1/.torchcache.json")
    assert_same(load(other_pool, uri, state()), state())
    with pytest.raises(dcp.CheckpointException) as raised:
        save(other_pool, uri, state())
    assert isinstance(failure(raised), tc.AlreadyExists)


def test_stock_checkpoints_in_s3_load(pool: tc.Pool, s3: SeaweedFS, bucket: str, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "stock", thread_count=2))
    upload(s3, bucket, "stock/", tmp_path / "stock")
    assert_same(load(pool, f"s3://{bucket}/stock", state()), state())


def test_checkpoints_in_the_file_system(pool: tc.Pool, tmp_path: Path) -> None:
    save(pool, tmp_path / "ours", state(), durability="store")
    loaded = blank(state())
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "ours"))
    assert_same(loaded, state())
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    assert_same(load(pool, str(tmp_path / "stock"), state()), state())


def test_torch_s_format_tools_both_ways(pool: tc.Pool, tmp_path: Path) -> None:
    content = {"a": {"w": torch.arange(1000.0), "n": 3}, "b": torch.ones(4, 5, dtype=torch.bfloat16)}
    save(pool, tmp_path / "ours", content, durability="store")
    dcp_to_torch_save(tmp_path / "ours", tmp_path / "all.pt")
    assert_same(torch.load(tmp_path / "all.pt", weights_only=True), content)
    torch_save_to_dcp(tmp_path / "all.pt", tmp_path / "theirs")
    assert_same(load(pool, tmp_path / "theirs", content), content)


def test_large_states_travel_in_several_files(pool: tc.Pool, other_pool: tc.Pool, bucket: str) -> None:
    tensors = {f"w{i}": torch.arange(i, i + 5_000_000, dtype=torch.int32) for i in range(6)}  # 20 MB each
    uri = f"s3://{bucket}/large"
    save(pool, uri, tensors, durability="store")
    manifest = Manifest.decode(pool.get_save(*pool.resolve(uri)).manifest, where=uri)
    assert len(manifest.files) > 1
    assert_same(load(pool, uri, tensors), tensors)
    assert_same(load(other_pool, uri, tensors), tensors)


def test_overwriting_is_asked_for(pool: tc.Pool, other_pool: tc.Pool, bucket: str) -> None:
    uri = f"s3://{bucket}/step-1"
    save(pool, uri, {"a": 1})
    with pytest.raises(dcp.CheckpointException, match="pass overwrite=True or another path") as raised:
        save(pool, uri, {"a": 2})
    assert isinstance(failure(raised), tc.AlreadyExists)
    assert load(pool, uri, {"a": 0}) == {"a": 1}
    save(pool, uri, {"a": 3}, overwrite=True, durability="store")
    assert load(pool, uri, {"a": 0}) == {"a": 3}
    assert load(other_pool, uri, {"a": 0}) == {"a": 3}


def test_of_two_writers_of_one_path_one_wins_f31(pool: tc.Pool, bucket: str) -> None:
    uri = f"s3://{bucket}/step-1"
    start = threading.Barrier(2)
    outcomes: list[BaseException | int] = []

    def write(number: int) -> None:
        start.wait(300)
        try:
            save(pool, uri, {"a": number})
            outcomes.append(number)
        except dcp.CheckpointException as error:
            outcomes.append(error.failures[0][0])

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    (loser,) = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert isinstance(loser, tc.AlreadyExists)
    assert load(pool, uri, {"a": 0}) == {"a": winner}


def test_saves_in_the_background_and_one_writer_for_all(pool: tc.Pool, bucket: str) -> None:
    writer = tc.CacheStorageWriter(f"s3://{bucket}/run", pool=pool)
    content = state()
    del content["model"]["complex"]  # torch's own stager loses the conjugation
    futures: list[Any] = []
    for step in range(3):
        content["step"] = step
        futures.append(
            dcp.async_save(content, storage_writer=writer, checkpoint_id=f"s3://{bucket}/run/step-{step}")
        )
    for future in futures:
        future.result(300)
    for step in range(3):
        assert_same(load(pool, f"s3://{bucket}/run/step-{step}", content), {**content, "step": step})


def test_a_save_in_the_background_is_finished_though_the_script_ends(bucket: str) -> None:
    """As with torch's own writer: who does not wait for the last future has its checkpoint nevertheless."""
    script = """if True:
        import sys, torch, torch.distributed.checkpoint as dcp, torchcache as tc
        dcp.async_save({"w": torch.arange(100_000)}, storage_writer=tc.CacheStorageWriter(sys.argv[1]))
    """
    uri = f"s3://{bucket}/step-1"
    subprocess.run([sys.executable, "-c", script, uri], check=True, timeout=120)
    content = {"w": torch.zeros(100_000, dtype=torch.int64)}
    dcp.load(content, storage_reader=tc.CacheStorageReader(uri))
    assert torch.equal(content["w"], torch.arange(100_000))


def test_an_error_in_the_background_arrives(pool: tc.Pool, bucket: str) -> None:
    save(pool, f"s3://{bucket}/x", {"a": 1})
    future: Any = dcp.async_save(
        {"a": 2}, storage_writer=tc.CacheStorageWriter(f"s3://{bucket}/x", pool=pool)
    )
    with pytest.raises(dcp.CheckpointException, match="already holds a checkpoint"):
        future.result(300)


def test_a_changed_byte_in_s3_is_noticed_f34(
    pool: tc.Pool, other_pool: tc.Pool, s3: SeaweedFS, bucket: str
) -> None:
    content = {"w": torch.arange(100_000)}
    uri = f"s3://{bucket}/step-1"
    save(pool, uri, content, durability="store")
    key = "step-1/__0_0.distcp"
    body = bytearray(s3.client.get_object(Bucket=bucket, Key=key)["Body"].read())
    body[500_000] ^= 1
    s3.client.put_object(Bucket=bucket, Key=key, Body=bytes(body))
    with pytest.raises(dcp.CheckpointException, match=r"'w' in file __0_0\.distcp does not match") as raised:
        load(other_pool, uri, content)
    assert isinstance(failure(raised), tc.IntegrityError)
    assert_same(load(pool, uri, content), content)  # this pool still has its own copy


def test_a_corrupt_manifest_in_s3_is_refused_f33(
    pool: tc.Pool, other_pool: tc.Pool, s3: SeaweedFS, bucket: str
) -> None:
    save(pool, f"s3://{bucket}/x", {"a": 1}, durability="store")
    body = s3.client.get_object(Bucket=bucket, Key="x/.torchcache.json")["Body"].read()
    s3.client.put_object(Bucket=bucket, Key="x/.torchcache.json", Body=body.replace(b'"bytes"', b'"bites"'))
    with pytest.raises(dcp.CheckpointException, match="checksum is wrong"):
        load(other_pool, f"s3://{bucket}/x", {"a": 1})


def test_an_evil_metadata_in_s3_is_refused(pool: tc.Pool, s3: SeaweedFS, bucket: str, tmp_path: Path) -> None:
    evil = pickle.dumps(Evil(tmp_path / "executed"))
    s3.client.put_object(Bucket=bucket, Key="x/.metadata", Body=evil)
    with pytest.raises(dcp.CheckpointException, match="refused, and not executed"):
        load(pool, f"s3://{bucket}/x", {"a": 1})
    assert not (tmp_path / "executed").exists()


def test_nothing_there_says_so(pool: tc.Pool, bucket: str) -> None:
    with pytest.raises(dcp.CheckpointException, match=f"no committed checkpoint at s3://{bucket}/none"):
        load(pool, f"s3://{bucket}/none", {"a": 1})
    with pytest.raises(dcp.CheckpointException, match="no-such-bucket-at-all"):
        load(pool, "s3://no-such-bucket-at-all/x", {"a": 1})


def test_without_a_pool_the_embedded_one_is_used(s3: SeaweedFS, bucket: str) -> None:
    dcp.save(state(), storage_writer=tc.CacheStorageWriter(f"s3://{bucket}/x", durability="store"))
    loaded = blank(state())
    dcp.load(loaded, storage_reader=tc.CacheStorageReader(f"s3://{bucket}/x"))
    assert_same(loaded, state())
    tc.LocalPool().close()


def test_many_items(pool: tc.Pool, other_pool: tc.Pool, bucket: str, s3: SeaweedFS) -> None:
    """Metadata and manifest of a large model are larger than a control message may be."""
    tensors = {f"{i:05}." + "x" * 1000: torch.full((2,), i) for i in range(4_500)}
    save(pool, f"s3://{bucket}/x", tensors, durability="store")
    for name in (".metadata", ".torchcache.json"):
        assert s3.client.head_object(Bucket=bucket, Key=f"x/{name}")["ContentLength"] > 4 << 20
    assert_same(load(pool, f"s3://{bucket}/x", tensors), tensors)
    assert_same(load(other_pool, f"s3://{bucket}/x", tensors), tensors)


def test_an_under_store_may_be_named(pool: tc.Pool, bucket: str) -> None:
    """As the fsspec file system names it."""
    named, uri = f"torchcache://s3/{bucket}/run", f"s3://{bucket}/run"
    content = state()
    with tc.CheckpointManager(named, pool=pool, rng=False) as manager:
        manager.save(1, dict(content))
        manager.wait_durable(1, timeout_s=120)
        assert manager.latest() == 1
    assert [(c.uri, c.state) for c in list_checkpoints(pool, named)] == [(f"{uri}/step-1", "durable")]
    save = pool.get_save(*pool.resolve(f"{named}/step-1"))
    assert Manifest.decode(save.manifest, where=named).checkpoint == f"{uri}/step-1"
    assert_same(load(pool, f"{named}/step-1", content), content)
    loaded = blank(content)
    dcp.load(loaded, storage_reader=FsspecReader(f"{named}/step-1", pool=pool))
    assert_same(loaded, content)
    with pytest.raises(
        dcp.CheckpointException, match=r"should start with the name of an under-store.*file, s3"
    ):
        load(pool, f"torchcache://{bucket}/run/step-1", content)
