"""From the second epoch on nothing goes to S3: by our own counters, and by a proxy that sees every request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.proxy import CountingProxy

SAMPLES = 120


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()
    for i in range(SAMPLES):
        s3.client.put_object(Bucket=name, Key=f"data/{i:03d}.bin", Body=payload(i))
    return name


def payload(index: int) -> bytes:
    return np.random.default_rng(index).bytes(1000 + 7 * index)


def decode(data: memoryview) -> torch.Tensor:
    return torch.tensor([len(data), sum(data[:10])])


def reads(pool: tc.Pool) -> int:
    return sum(store.read_requests for server in pool.status() for store in server.under_stores)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_second_epoch_sends_no_request_to_s3(s3: SeaweedFS, bucket: str, method: str) -> None:
    with (
        CountingProxy(s3.endpoint_url) as proxy,
        environment({"AWS_ENDPOINT_URL": proxy.endpoint_url}),
        tc.LocalPool() as pool,
    ):
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", decode=decode, pool=pool)
        loader = DataLoader(
            dataset,
            batch_size=16,
            shuffle=True,
            num_workers=2 if method == "fork" else 1,  # spawning takes longer than all the rest
            multiprocessing_context=method,
            persistent_workers=method == "spawn",
        )
        epochs = []
        for _ in range(3):
            before = len(proxy.requests), reads(pool)
            batches = list(loader)
            epochs.append((len(proxy.requests) - before[0], reads(pool) - before[1]))
            seen = sorted(torch.cat(batches).tolist())
            assert seen == sorted([len(payload(i)), sum(payload(i)[:10])] for i in range(SAMPLES))
    assert epochs[0] == (SAMPLES, SAMPLES)
    assert epochs[1:] == [(0, 0), (0, 0)]


def test_a_batch_is_one_call_not_one_a_sample(s3: SeaweedFS, bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", pool=pool)
        before = sum(server.read_calls for server in pool.status())
        for start in range(0, SAMPLES, 30):
            indices = list(range(start, start + 30))
            assert dataset.__getitems__(indices) == [payload(i) for i in indices]
        assert sum(server.read_calls for server in pool.status()) - before == SAMPLES // 30
