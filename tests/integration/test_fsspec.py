"""fsspec over a real pool and a real S3 server: pandas, pyarrow and torch's own checkpoint writer."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as dcp

from examples.seaweedfs import SeaweedFS, environment
from tests.integration.fsspec_child import read_in_child
from torchcache.errors import ConfigurationError
from torchcache.filesystem import TorchCacheFileSystem
from torchcache.local_pool import LocalPool
from torchcache.model import CHUNK_BYTES
from torchcache.pool import Pool


@pytest.fixture(scope="module")
def pool(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with (
        environment(s3_server.environment()),
        LocalPool(tmp_path_factory.mktemp("pool"), capacity="512MiB") as pool,
    ):
        yield pool


@pytest.fixture
def fs(pool: Pool) -> TorchCacheFileSystem:
    return TorchCacheFileSystem(pool)


@pytest.fixture
def bucket(s3_server: SeaweedFS) -> str:
    return s3_server.make_bucket()


def reads_of_s3(pool: Pool) -> int:
    return sum(u.read_requests for server in pool.status() for u in server.under_stores)


def test_what_is_there(fs: TorchCacheFileSystem, bucket: str, s3_server: SeaweedFS) -> None:
    assert fs.ls("", detail=False) == ["file", "s3"]
    assert fs.isdir(f"s3/{bucket}")
    assert fs.ls(f"s3/{bucket}") == []
    for key in ("a.txt", "d/x", "d/e/y", "päth/ü"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    assert fs.ls(f"torchcache://s3/{bucket}", detail=False) == [
        f"s3/{bucket}/{n}" for n in ("a.txt", "d", "päth")
    ]
    assert fs.find(f"s3/{bucket}/d") == [f"s3/{bucket}/d/e/y", f"s3/{bucket}/d/x"]
    assert fs.glob(f"s3/{bucket}/**/?") == [
        f"s3/{bucket}/{n}" for n in ("d", "d/e", "d/e/y", "d/x", "päth/ü")
    ]
    assert fs.info(f"s3/{bucket}/d/x")["size"] == 3
    assert fs.cat(f"s3/{bucket}/päth/ü") == "päth/ü".encode()
    assert not fs.exists(f"s3/{bucket}/none")
    assert not fs.exists("s3/no-such-bucket-here")
    with pytest.raises(FileNotFoundError, match="no-such-bucket-here"):
        fs.ls("s3/no-such-bucket-here/x")
    with pytest.raises(ConfigurationError, match="gcs"):
        fs.exists("gcs/bucket/x")


def test_reads_fill_the_cache_and_then_come_from_it(
    fs: TorchCacheFileSystem, pool: Pool, bucket: str, s3_server: SeaweedFS
) -> None:
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 12_345)
    s3_server.client.put_object(Bucket=bucket, Key="big", Body=data)
    with fs.open(f"s3/{bucket}/big") as file:
        assert file.read() == data
    before = reads_of_s3(pool)
    with fs.open(f"s3/{bucket}/big") as file:
        file.seek(CHUNK_BYTES - 5)
        assert file.read(10) == data[CHUNK_BYTES - 5 : CHUNK_BYTES + 5]
    assert fs.cat_ranges([f"s3/{bucket}/big"] * 2, [0, -7], [3, None]) == [data[:3], data[-7:]]
    assert reads_of_s3(pool) == before


def test_writes_are_whole_or_not_there(fs: TorchCacheFileSystem, bucket: str, s3_server: SeaweedFS) -> None:
    data = np.random.default_rng(1).bytes(9_000_000)
    with fs.open(f"s3/{bucket}/w", "wb") as file:
        file.write(data)
        assert not fs.exists(f"s3/{bucket}/w")
    assert s3_server.client.get_object(Bucket=bucket, Key="w")["Body"].read() == data
    with pytest.raises(RuntimeError), fs.open(f"s3/{bucket}/broken", "wb") as file:
        file.write(data)
        raise RuntimeError
    assert fs.find(f"s3/{bucket}") == [f"s3/{bucket}/w"]
    with fs.open(f"s3/{bucket}/w", "wb") as file:
        file.write(b"replaced")
    assert fs.cat(f"s3/{bucket}/w") == b"replaced"
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"s3/{bucket}/w", b"again", mode="create")
    fs.touch(f"s3/{bucket}/empty")
    assert fs.cat(f"s3/{bucket}/empty") == b""


def test_mv_and_rm(fs: TorchCacheFileSystem, bucket: str, s3_server: SeaweedFS) -> None:
    fs.pipe({f"s3/{bucket}/d/{i}": bytes([i]) for i in range(3)})
    fs.mv(f"s3/{bucket}/d", f"s3/{bucket}/moved", recursive=True)
    assert fs.find(f"s3/{bucket}") == [f"s3/{bucket}/moved/{i}" for i in range(3)]
    fs.rm(f"s3/{bucket}/moved", recursive=True)
    assert "Contents" not in s3_server.client.list_objects_v2(Bucket=bucket)


def test_the_file_under_store(fs: TorchCacheFileSystem, tmp_path: Path) -> None:
    path = f"file{tmp_path}/folder/x"
    fs.pipe_file(path, b"on disk")
    assert (tmp_path / "folder/x").read_bytes() == b"on disk"
    assert fs.ls(f"file{tmp_path}/folder", detail=False) == [path]
    assert fs.cat(path) == b"on disk"


def test_pandas(fs: TorchCacheFileSystem, pool: Pool, bucket: str) -> None:
    frame = pd.DataFrame({"n": range(1000), "text": [f"row {i}" for i in range(1000)]})
    options = {"pool": pool}
    frame.to_parquet(f"torchcache://s3/{bucket}/f.parquet", storage_options=options)
    pd.testing.assert_frame_equal(
        pd.read_parquet(f"torchcache://s3/{bucket}/f.parquet", storage_options=options), frame
    )
    frame.to_csv(f"torchcache://s3/{bucket}/f.csv.gz", index=False, storage_options=options)
    pd.testing.assert_frame_equal(
        pd.read_csv(f"torchcache://s3/{bucket}/f.csv.gz", storage_options=options), frame
    )


def test_pyarrow(fs: TorchCacheFileSystem, bucket: str) -> None:
    table = pa.table({"n": list(range(10_000)), "part": [i % 3 for i in range(10_000)]})
    pyarrow.dataset.write_dataset(
        table, f"s3/{bucket}/ds", filesystem=fs, format="parquet", partitioning=["part"]
    )
    found = pyarrow.dataset.dataset(f"s3/{bucket}/ds", filesystem=fs, partitioning=["part"])
    assert found.to_table(filter=pyarrow.dataset.field("part") == 1).num_rows == 3333
    assert sorted(found.to_table()["n"].to_pylist()) == list(range(10_000))
    pyarrow.parquet.write_table(table, f"s3/{bucket}/one.parquet", filesystem=fs)
    assert pyarrow.parquet.read_table(f"s3/{bucket}/one.parquet", filesystem=fs).equals(table)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_travels_to_other_processes(fs: TorchCacheFileSystem, bucket: str, method: str) -> None:
    path = f"s3/{bucket}/x"
    fs.pipe_file(path, b"for the child")
    assert fs.cat(path) == b"for the child"
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    child = context.Process(target=read_in_child, args=(pickle.dumps(fs), path, theirs))
    child.start()
    theirs.close()
    assert mine.poll(120)
    assert mine.recv() == b"for the child"
    child.join(120)
    assert child.exitcode == 0
    mine.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_saves_and_loads_by_checkpoint_id(s3: SeaweedFS) -> None:
    """With nothing but a URL: torch finds its FsspecWriter, fsspec finds us, and we find the embedded pool."""
    bucket = s3.make_bucket()
    url = f"torchcache://s3/{bucket}/run/step-1"
    state = {"w": torch.randn(300, 400), "b": torch.arange(10, dtype=torch.bfloat16), "step": 7}
    try:
        dcp.save(state, checkpoint_id=url, no_dist=True)
        objects = s3.client.list_objects_v2(Bucket=bucket)["Contents"]
        assert [o["Key"] for o in objects] == ["run/step-1/.metadata", "run/step-1/__0_0.distcp"]
        loaded = {"w": torch.zeros(300, 400), "b": torch.zeros(10, dtype=torch.bfloat16), "step": 0}
        dcp.load(loaded, checkpoint_id=url, no_dist=True)
        assert torch.equal(loaded["w"], state["w"])
        assert torch.equal(loaded["b"], state["b"])
        assert loaded["step"] == 7
        with pytest.warns(UserWarning, match="existing checkpoint"):
            dcp.save(
                state | {"step": 8}, checkpoint_id=url, no_dist=True
            )  # FsspecWriter overwrites by default
        dcp.load(loaded, checkpoint_id=url, no_dist=True)
        assert loaded["step"] == 8
    finally:
        fsspec.get_filesystem_class("torchcache").clear_instance_cache()
