"""CachedDataset around a dataset, over a real embedded pool: each sample is computed once, whoever asks, whenever."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc

SAMPLES = 100


class Sample(NamedTuple):
    image: torch.Tensor
    embedding: torch.Tensor
    box: np.ndarray[Any, Any]
    label: int
    name: str


def expected(index: int) -> Sample:
    return Sample(
        image=torch.full((3, 8, 8), index, dtype=torch.uint8),
        embedding=torch.arange(index, index + 4, dtype=torch.bfloat16),
        box=np.array([index, -index], dtype=np.float32),
        label=index % 10,
        name=f"sample {index}",
    )


class Slow(Dataset[Sample]):
    """Writes down every computation in a file, because workers don't share memory."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b"%d\n" % index)
        os.close(descriptor)
        return expected(index)


def computed(log: Path) -> Counter[int]:
    return Counter(map(int, log.read_text().split()))


def check(batch: Sample) -> list[int]:
    """That a collated batch is what the dataset gives; its indices."""
    assert type(batch) is Sample
    indices = [int(name.removeprefix("sample ")) for name in batch.name]
    for row, index in enumerate(indices):
        want = expected(index)
        assert torch.equal(batch.image[row], want.image)
        assert torch.equal(batch.embedding[row], want.embedding)
        assert batch.embedding.dtype == torch.bfloat16
        assert np.array_equal(batch.box[row], want.box)
        assert batch.label[row] == want.label  # type: ignore[index]
    return indices


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_hundred_samples_are_computed_a_hundred_times(tmp_path: Path, method: str) -> None:
    """Over 3 epochs, a restart of the pool, and 2 workers, or one where starting it takes longer than all the rest."""
    log = tmp_path / "computed"
    for epochs in (2, 1):
        with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:
            dataset = tc.CachedDataset(Slow(log), pool=pool)
            loader = DataLoader(
                dataset,
                batch_size=8,
                shuffle=True,
                num_workers=2 if method == "fork" else 1,
                multiprocessing_context=method,
                persistent_workers=True,
            )
            for _ in range(epochs):
                assert sorted(i for batch in loader for i in check(batch)) == list(range(SAMPLES))
            assert dataset.residency().fraction == 1.0
    assert computed(log) == dict.fromkeys(range(SAMPLES), 1)


def test_another_version_is_computed_anew_and_the_old_one_stays(tmp_path: Path) -> None:
    log = tmp_path / "computed"
    with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:
        for version in (1, 2, 1):
            dataset = tc.CachedDataset(Slow(log), name="slow", version=version, pool=pool)
            check(torch.utils.data.default_collate(dataset.__getitems__([3, 4])))
    assert computed(log) == {3: 2, 4: 2}


def test_a_batch_is_one_read_and_one_write(tmp_path: Path) -> None:
    with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:
        dataset = tc.CachedDataset(Slow(tmp_path / "computed"), pool=pool)
        for writes in (1, 0):
            before = pool.statistics()
            dataset.__getitems__(list(range(64)))
            after = pool.statistics()
            assert after.read_calls - before.read_calls == 1
            assert after.write_calls - before.write_calls == writes


def test_samples_larger_than_a_chunk(tmp_path: Path) -> None:
    volumes = [torch.randn(3, 1_100_000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:
        dataset = tc.CachedDataset(volumes, name="volumes", pool=pool)
        for _ in range(2):
            assert all(map(torch.equal, dataset.__getitems__([0, 1]), volumes))
        assert dataset.residency().resident_objects == 2


def test_training_goes_on_when_the_pool_is_too_small(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More is computed than fits: everything comes right, what fits is kept."""
    count = 12
    samples = [torch.randn(1_000_000, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    with tc.LocalPool(tmp_path / "pool", capacity="32MiB") as pool:
        dataset = tc.CachedDataset(samples, name="large", pool=pool)
        for _ in range(2):
            for i in range(count):
                assert torch.equal(dataset[i], samples[i])
        kept = dataset.residency().resident_objects
    assert 0 < kept < count
    assert caplog.text.count("computed samples are not kept") == 1


def test_prefetch_computes_the_next_epoch_of_this_rank(tmp_path: Path) -> None:
    log = tmp_path / "computed"
    with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:
        dataset = tc.CachedDataset(Slow(log), pool=pool)
        sampler = DistributedSampler(dataset, num_replicas=4, rank=1, seed=1)
        handle = dataset.prefetch(sampler, 2)
        assert handle.wait(300)
        assert handle.staged == handle.total == SAMPLES // 4
        sampler.set_epoch(2)
        in_order = [int(line) for line in log.read_text().split()]
        assert in_order == list(sampler)
        dataset.__getitems__(list(sampler))
    assert computed(log) == dict.fromkeys(in_order, 1)


def batches(loader: StatefulDataLoader[Any], count: int | None = None) -> list[list[int]]:
    found = []
    for batch in loader:
        found.append(check(batch))
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_the_right_sample(tmp_path: Path, workers: int) -> None:
    with tc.LocalPool(tmp_path / "pool", capacity="256MiB") as pool:

        def make(name: str = "slow") -> StatefulDataLoader[Any]:
            torch.manual_seed(5)
            dataset = tc.CachedDataset(Slow(tmp_path / "computed"), name=name, pool=pool)
            return StatefulDataLoader(dataset, batch_size=8, shuffle=True, num_workers=workers)

        whole = batches(make())
        interrupted = make()
        before = batches(interrupted, 5)
        state = interrupted.state_dict()
        resumed = make()
        resumed.load_state_dict(state)
        assert before + batches(resumed) == whole
        other = make("another")
        other.load_state_dict(state)
        with pytest.raises(tc.ConfigurationError, match="name was 'slow', is 'another'"):
            next(iter(other))
