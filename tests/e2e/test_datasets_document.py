"""What docs/datasets.md and docs/coming-from.md show is run, over a bucket that has what they speak of."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import webdataset as wds

import torchcache as tc
from examples.seaweedfs import SeaweedFS
from tests.unit import shards
from torchcache.filesystem import TorchCacheFileSystem

DOCUMENTS = Path(__file__).parents[2] / "docs"


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
    for i in range(2):
        put(f"digits-{i}.tar", digits())
        put(f"digits/{i}.png", picture())
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


def picture() -> bytes:
    sink = io.BytesIO()
    PIL.Image.new("L", (3, 2)).save(sink, "png")
    return sink.getvalue()


def digits() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for extension, data in (("png", picture()), ("cls", b"7"), ("json", b'{"by": "hand"}')):
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def texts(numbers: range) -> bytes:
    return b"".join(b'{"text": "text %d"}\n' % n for n in numbers)


def run(name: str, bucket: str) -> dict[str, Any]:
    """What stands in the names of a document's code when all of it has run."""
    document = DOCUMENTS / name
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    code = re.sub("(s3://|/s3/)bucket/", rf"\1{bucket}/", "\n".join(blocks))
    found: dict[str, Any] = {"__name__": "document", "blocks": len(blocks)}
    exec(compile(code, str(document), "exec"), found)
    return found


def test_the_documents_run(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setitem(wds.gopen_schemes, "torchcache", None)  # the document sets it
    TorchCacheFileSystem.clear_instance_cache()
    with tc.LocalPool():
        found = run("datasets.md", bucket)
        assert found["blocks"] >= 6
        assert len(found["rest"]) == 40 - 4 * 4
        assert found["digits"][0].size == (3, 2)

        found = run("coming-from.md", bucket)
        assert found["blocks"] >= 8
        assert sorted(found["pairs"]) == sorted((n + 2, n % 7) for n in range(40))
        assert sorted(found["sizes"]) == [n + 2 for n in range(40)]
        assert found["labels_of_all"] == [n % 7 for n in range(40)]
        assert len(found["left"]) == len(set(found["left"])) == 40 - 2 * 8
        assert sorted(torch.cat(found["token_batches"])[:, 0].tolist()) == list(range(24))
        assert found["folder"].__getitems__([0, 3]) == [(b"image", 0), (b"image", 1)]
        assert (*found["image_bytes"], *found["first_labels"].tolist()) == (*[b"image"] * 4, 0, 0, 1, 1)
        assert found["good"].skipped == 0
        assert found["first_row"] == {"n": 0, "text": "t0"}
    TorchCacheFileSystem.clear_instance_cache()
