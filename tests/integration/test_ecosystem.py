"""Libraries that read through the pool by fsspec, as their users call them: datasets, polars, webdataset.

pandas and pyarrow are in test_fsspec.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import webdataset as wds

from examples.seaweedfs import SeaweedFS
from tests.unit import shards
from torchcache.filesystem import TorchCacheFileSystem
from torchcache.local_pool import LocalPool
from torchcache.pool import Pool

ROWS = 300


@pytest.fixture
def pool(s3: SeaweedFS) -> Iterator[Pool]:
    """The embedded pool, which paths without storage options mean."""
    with LocalPool() as local_pool:
        TorchCacheFileSystem.clear_instance_cache()
        yield local_pool
    TorchCacheFileSystem.clear_instance_cache()


@pytest.fixture
def folder(s3: SeaweedFS, pool: Pool) -> str:
    """The path of a folder that has what is read here."""
    bucket = s3.make_bucket()
    for number, first in enumerate(range(0, ROWS, 100)):
        numbers = range(first, first + 100)
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(shards.table(numbers), sink, row_group_size=30)
        s3.client.put_object(Bucket=bucket, Key=f"data/{number}.parquet", Body=sink.getvalue().to_pybytes())
        s3.client.put_object(Bucket=bucket, Key=f"data/{number}.tar", Body=shards.tar(numbers))
    return f"s3/{bucket}/data"


def reads_of_s3(pool: Pool) -> int:
    return sum(store.read_requests for server in pool.status() for store in server.under_stores)


def test_datasets(pool: Pool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets  # which reads the environment when it is imported

    datasets.disable_progress_bars()

    def load(name: str, *, streaming: bool) -> Any:
        return datasets.load_dataset(
            "parquet",
            data_files=f"torchcache://{folder}/*.parquet",
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path / name),
        )

    assert [row["n"] for row in load("first", streaming=False)] == list(range(ROWS))
    before = reads_of_s3(pool)
    assert before
    for streaming in (False, True):
        found = load("second", streaming=streaming)
        assert [row["text"] for row in found] == [f"t{n}" for n in range(ROWS)]
    assert reads_of_s3(pool) == before


def test_polars_and_pyarrow(pool: Pool, folder: str) -> None:
    """polars' own readers of URLs know no fsspec: it is given an open file, or a dataset of pyarrow's."""
    fs = fsspec.filesystem("torchcache")
    with fs.open(f"{folder}/1.parquet") as file:
        assert pl.read_parquet(file)["n"].to_list() == list(range(100, 200))
    parts = pyarrow.dataset.dataset(sorted(fs.glob(f"{folder}/*.parquet")), filesystem=fs)
    found = pl.scan_pyarrow_dataset(parts)
    assert found.filter(pl.col("n") >= 250).select("n").collect()["n"].to_list() == list(range(250, ROWS))
    before = reads_of_s3(pool)
    assert found.select("text").collect().height == ROWS
    with pa.parquet.ParquetFile(f"{folder}/0.parquet", filesystem=fs) as whole:
        assert whole.read_row_group(2, columns=["n"])["n"].to_pylist() == list(range(60, 90))
    assert reads_of_s3(pool) == before


def test_webdataset(pool: Pool, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        wds.gopen_schemes, "torchcache", lambda url, mode, bufsize: fsspec.open(url, mode).open()
    )
    urls = f"torchcache://{folder}/{{0..2}}.tar"

    def numbers() -> list[int]:
        samples = wds.WebDataset(urls, shardshuffle=False).to_tuple("txt")
        return [int(text) for (text,) in samples]

    assert numbers() == list(range(ROWS))
    before = reads_of_s3(pool)
    assert before
    assert numbers() == list(range(ROWS))
    assert reads_of_s3(pool) == before
