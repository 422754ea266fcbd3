"""Samples are those that webdataset and Hugging Face's datasets make of the same files."""

from __future__ import annotations

import datetime
import gc
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

import torchcache as tc

MEMBERS = {
    "a/0001.jpg": b"\xff\xd8",
    "a/0001.cls": b"3",
    "a/0001.seg.PNG": b"two dots, upper case",
    "./b.c/0002.TXT": "é".encode(),
    "./b.c/0002.json": b'{"x": 1}',
    "a/0003": b"no extension",
    "0004.bin": b"",
    "__meta__.txt": b"of no sample",
    "a/.hidden": b"all extension",
    "a/0001.jpg.txt": b"the first's key again, later",
}

ROWS: list[dict[str, Any]] = [
    {
        "n": n,
        "share": n / 7,
        "text": "é\n" * (n % 3),
        "maybe": None if n % 2 else n,
        "tokens": list(range(n % 4)),
        "of": {"a": [n], "b": None, "yes": n % 2 == 0},
        "pairs": [{"k": str(k), "v": k} for k in range(n % 3)],
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)  # webdataset's own
def test_tars_as_webdataset_reads_them(pool: tc.Pool, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    def without_place(samples: Any) -> list[dict[str, Any]]:
        """They call the shard by its path, we by its URI."""
        return [
            {k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")} for sample in samples
        ]

    theirs = without_place(wds.WebDataset(str(path), shardshuffle=False))
    gc.collect()  # its open file is let go here, not in another test
    assert len(theirs) >= 4
    assert without_place(tc.CachedIterableDataset(str(path), pool=pool)) == theirs


@pytest.mark.parametrize("name", ["json", "parquet", "arrow"])
def test_tables_as_datasets_reads_them(
    pool: tc.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets  # which reads the environment when it is imported

    datasets.disable_progress_bars()
    day = datetime.datetime(2026, 1, 1)
    rows = [row | {"at": day + datetime.timedelta(hours=row["n"]), "raw": bytes([row["n"]])} for row in ROWS]
    if name == "json":
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        path = tmp_path / f"x.{name}"
        table = pa.Table.from_pylist(rows)
        if name == "parquet":
            pq.write_table(table, path, row_group_size=7)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=5)
    theirs = datasets.load_dataset(
        name, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    ours = list(tc.CachedIterableDataset(str(path), pool=pool))
    assert ours == list(theirs)
    assert len(ours) == len(ROWS)
