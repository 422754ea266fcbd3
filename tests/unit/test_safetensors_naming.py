"""What safetensors files are called in the pool."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from tests.unit.sample_pool import SamplePool, pool
from torchcache.checkpoint import open_safetensors, safetensors

__all__ = ["pool"]


def one_tensor() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.0, 2.0)


@pytest.mark.parametrize("kind", ["file", "folder", "index"])
@pytest.mark.parametrize("folder", ["s3://b/llama", "torchcache://s3/b/llama"])
def test_the_namespace_is_the_folder_at_storage(
    pool: SamplePool, folder: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "connect", lambda pool: pool)
    names = {"file": "x.safetensors", "folder": "", "index": "x.safetensors.index.json"}
    for name in ("x", "model"):
        pool.put(f"s3://b/llama/{name}.safetensors", one_tensor())
    index = {"metadata": {}, "weight_map": {"w": "x.safetensors"}}
    pool.put("s3://b/llama/x.safetensors.index.json", json.dumps(index).encode())
    given: Any = pool
    file = open_safetensors(f"{folder}/{names[kind]}", pool=given)
    assert file.get_tensor("w").tolist() == [1.0, 2.0]
    assert pool.namespaces == {"s3://b/llama"}
    assert "torchcache://" not in repr(file)
