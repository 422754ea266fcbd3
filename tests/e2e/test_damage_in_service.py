"""Damage under a live server: found by whoever reads, put right from S3, and the same request is answered right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import torchcache as tc
from examples.seaweedfs import SeaweedFS

SAMPLES = 40


def payload(index: int) -> bytes:
    return np.random.default_rng(index).bytes(40_000 + 13 * index)


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()
    for i in range(SAMPLES):
        s3.client.put_object(Bucket=name, Key=f"data/{i:03d}.bin", Body=payload(i))
    return name


def counted(pool: tc.Pool) -> tuple[int, int]:
    """Reads sent to S3, chunks found damaged."""
    servers = pool.status()
    reads = sum(store.read_requests for server in servers for store in server.under_stores)
    return reads, sum(server.corrupt for server in servers)


def flip(data: bytearray, at: int) -> None:
    data[at + 20_000] ^= 1 << 3


def zeros(data: bytearray, at: int) -> None:
    data[at : at + 40_000] = bytes(40_000)


def swap(data: bytearray, at: int) -> None:
    """Another sample's bytes in the place of these."""
    other = data.find(payload(0 if data[at : at + 100] != payload(0)[:100] else 1))
    data[at : at + 30_000] = data[other : other + 30_000]


@pytest.mark.parametrize("harm", [flip, zeros, swap])
def test_a_damaged_sample_is_fetched_again_within_the_same_call(
    bucket: str, tmp_path: Path, harm: Callable[[bytearray, int], None]
) -> None:
    """I1, F5, F8, F9: all samples in one batch, a quarter of them damaged on disk, and every byte is right."""
    with tc.LocalPool(tmp_path, capacity="256MB") as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", pool=pool)
        dataset.stage(progress=False)
        assert counted(pool) == (SAMPLES, 0)
        [file] = tmp_path.rglob("*.segment")
        damaged = random.Random(1).sample(range(2, SAMPLES), SAMPLES // 4)
        with file.open("r+b") as segment:
            data = bytearray(segment.read())
            for i in damaged:
                harm(data, data.find(payload(i)))
            segment.seek(0)
            segment.write(data)
        assert dataset.__getitems__(list(range(SAMPLES))) == [payload(i) for i in range(SAMPLES)]
        assert counted(pool) == (SAMPLES + len(damaged), len(damaged))
        assert dataset.__getitems__(list(range(SAMPLES))) == [payload(i) for i in range(SAMPLES)]
        assert counted(pool) == (SAMPLES + len(damaged), len(damaged)), "what was mended stays so"
        assert dataset.residency().fraction == 1.0
