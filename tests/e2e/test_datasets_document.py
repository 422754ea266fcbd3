"""What docs/datasets.md shows is run, in its order, over a bucket that has what it speaks of."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

import torchcache as tc
from examples.seaweedfs import SeaweedFS
from tests.unit import shards

DOCUMENT = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()

    def put(key: str, data: bytes) -> None:
        s3.client.put_object(Bucket=name, Key=key, Body=data)

    for i in range(4):
        put(f"train-{i:03d}.tar", webdataset(range(10 * i, 10 * i + 10)))
        put(f"text/{i}.jsonl.zst", shards.packed(texts(range(10 * i, 10 * i + 10)), ".zst"))
        put(f"table/{i}.parquet", shards.parquet(range(10 * i, 10 * i + 10)))
        put(f"images/{'cat' if i % 2 else 'dog'}/{i}.png", b"image")
    return name


def webdataset(numbers: range) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for n in numbers:
            for extension, data in (("jpg", b"\xff\xd8" + bytes(n)), ("cls", str(n % 7).encode())):
                info = tarfile.TarInfo(f"{n:06d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def texts(numbers: range) -> bytes:
    return b"".join(b'{"text": "text %d"}\n' % n for n in numbers)


def test_the_document_runs(bucket: str) -> None:
    text = DOCUMENT.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    code = "\n".join(blocks).replace("s3://bucket/", f"s3://{bucket}/")
    found: dict[str, Any] = {"__name__": "document"}
    with tc.LocalPool():
        exec(compile(code, str(DOCUMENT), "exec"), found)
        assert sorted(found["pairs"]) == sorted((n + 2, n % 7) for n in range(40))
        assert len(found["rest"]) == 40 - 4 * 4
        assert sorted(row["n"] for row in found["rows"]) == list(range(40))
        assert found["classes"] == ["cat", "dog"] and found["labels"] == [0, 0, 1, 1]
