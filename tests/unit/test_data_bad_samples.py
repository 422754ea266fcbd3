"""on_error="skip" of CachedDataset, over a pool in memory: batches are short of what can't be had, and say so."""

from __future__ import annotations

import gc
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset, default_collate

import torchcache as tc
from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import BufferPool, CachedDataset
from torchcache.errors import ConfigurationError, ObjectNotFound, ServerUnavailable, UnsupportedSample

__all__ = ["pool"]

COUNT = 8


def number_of(data: memoryview) -> int:
    return int(bytes(data))


def refusing_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is odd")
    return number


def files(pool: SamplePool, **options: Any) -> CachedDataset:
    """Samples 0 to 7, of which 1 is gone, 2 has changed, 4 isn't a number."""
    for i in range(COUNT):
        pool.put(f"s3://b/d/{i}", b"four" if i == 4 else b"%d" % i)
    dataset = CachedDataset.from_files("s3://b/d", pool=pool, **options)  # type: ignore[arg-type]
    pool.delete("s3://b/d/1")
    pool.put("s3://b/d/2", b"22")
    return dataset


def skipping(pool: SamplePool, **options: Any) -> CachedDataset:
    return files(pool, decode=number_of, transform=refusing_three, on_error="skip", **options)


def test_a_batch_is_short_of_them_and_the_log_names_them(
    pool: SamplePool, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = skipping(pool)
    assert dataset.skipped == 0
    assert dataset.__getitems__([7, 2, 0, 4, 1, 3, 5]) == [7, 0, 5]
    assert dataset.skipped == 4
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[0] for line in said] == [f"s3://b/d/{i} is skipped" for i in (2, 4, 1, 3)]
    assert [line.split(": ")[1] for line in said] == [
        "ObjectChanged",
        "ValueError",
        "ObjectNotFound",
        "ValueError",
    ]
    assert said[3].endswith("three is odd")
    pool.reads.clear()
    assert dataset.__getitems__([0, 6, 7]) == [0, 6, 7]
    assert len(pool.reads) == 1, "a good batch is one request"


def test_what_is_asked_for_alone_is_raised(pool: SamplePool) -> None:
    dataset = skipping(pool)
    with pytest.raises(ObjectNotFound, match="s3://b/d/1 is gone"):
        dataset[1]
    with pytest.raises(ValueError, match="three"):
        dataset[-5]
    assert dataset[0] == 0
    assert dataset.skipped == 0


def test_what_is_no_samples_matter_is_raised(pool: SamplePool) -> None:
    dataset = skipping(pool)
    pool.errors["s3://b/d/6"] = ServerUnavailable("S3 is away")
    for indices in ([0, 6], [1, 6]):
        with pytest.raises(ServerUnavailable, match="away"):
            dataset.__getitems__(indices)
    with pytest.raises(IndexError):
        dataset.__getitems__([0, COUNT])
    with pytest.raises(ConfigurationError, match="on_error='log'"):
        files(pool, on_error="log")


def test_records_are_named_by_their_number(pool: SamplePool, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(2):
        pool.put(f"s3://b/r/{i}", bytes(6))
    dataset = CachedDataset.from_files(
        "s3://b/r",
        record_bytes=2,
        decode=bytes,
        on_error="skip",
        pool=pool,  # type: ignore[arg-type]
    )
    pool.delete("s3://b/r/1")
    assert dataset.__getitems__([0, 5, 2]) == [bytes(2)] * 2
    assert "record 2 of s3://b/r/1 is skipped: ObjectNotFound" in caplog.text


def epoch(dataset: Any, **options: Any) -> list[Any]:
    return [batch for batch in DataLoader(dataset, batch_size=2, **options)]


def none_if_empty(batch: list[Any]) -> Any:
    return default_collate(batch) if batch else None


@pytest.mark.parametrize("collate", [None, tc.collate])
def test_a_batch_with_nothing_left_says_why(pool: SamplePool, collate: Any) -> None:
    """The batches are 0 and 1, 2 and 3, 4 and 5, 6 and 7."""
    with pytest.raises(ValueError, match="three is odd"):
        epoch(skipping(pool), collate_fn=collate)


def test_a_collate_fn_may_go_on_without(pool: SamplePool) -> None:
    dataset = skipping(pool)
    batches = epoch(dataset, collate_fn=none_if_empty)
    assert [batch if batch is None else batch.tolist() for batch in batches] == [[0], None, [5], [6, 7]]
    empty = dataset.__getitems__([1, 2])
    assert (empty, len(empty), type(pickle.loads(pickle.dumps(empty)))) == ([], 0, list)
    assert dataset.__getitems__([]) == []


def test_torchs_wrappers_pass_it_on_or_say_that_they_cannot(pool: SamplePool) -> None:
    dataset = skipping(pool)
    assert Subset(dataset, [0, 1, 5]).__getitems__([0, 1, 2]) == [0, 5]
    with pytest.raises(ValueError, match="size mismatch"):  # pairs would be of different samples
        StackDataset(dataset, range(COUNT)).__getitems__([0, 1])
    with pytest.raises(ObjectNotFound):  # it asks for each alone
        ConcatDataset([dataset, dataset])[1]


def test_bad_samples_keep_no_buffers(pool: SamplePool) -> None:
    """Tracebacks refer to the frames of a read; those must not keep others' memory until the next collection."""

    def checked(sample: Any) -> Any:
        if bytes(sample) in (b"3", b"four"):
            raise ValueError("bad")
        return sample

    buffers = BufferPool("1MiB")
    dataset = files(pool, output="numpy", buffers=buffers, transform=checked, on_error="skip")
    gc.collect()
    gc.disable()
    try:
        for indices in ([0, 3, 4, 5], [3, 0, 4], [0, 3]):
            batch = dataset.__getitems__(indices)
            assert batch
            assert buffers.lent_bytes
            del batch
            assert buffers.lent_bytes == 0
    finally:
        gc.enable()


class Sevenths(Dataset[Any]):
    """Every seventh raises, every fifth is of no type that can be kept."""

    def __init__(self) -> None:
        self.computed: Counter[int] = Counter()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        self.computed[index] += 1
        if index % 7 == 0:
            raise KeyError(index)
        return {index} if index % 5 == 0 else torch.tensor(index)


class Batched(Sevenths):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


GOOD = [i for i in range(20) if i % 7 and i % 5]


@pytest.mark.parametrize("source", [Sevenths, Batched])
def test_computed_samples(pool: SamplePool, source: type[Sevenths], caplog: pytest.LogCaptureFixture) -> None:
    wrapped = source()
    dataset = CachedDataset(wrapped, name="n", version=3, on_error="skip", pool=pool)  # type: ignore[arg-type]
    for epochs in (1, 2):
        assert [int(sample) for sample in dataset.__getitems__(range(20))] == GOOD
        assert dataset.skipped == epochs * (20 - len(GOOD))
    assert "sample 7 of n@3 is skipped: KeyError: 7" in caplog.text
    assert "sample 5 of n@3 is skipped: UnsupportedSample" in caplog.text
    assert max(wrapped.computed[i] for i in GOOD) <= 2, "the second epoch computes none of them"
    with pytest.raises(UnsupportedSample):
        dataset[5]


def test_a_stage_of_computed_samples_lists_them(pool: SamplePool) -> None:
    dataset = CachedDataset(Sevenths(), name="n", pool=pool)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        dataset.stage(progress=False)
    report = dataset.stage(progress=False, on_missing="report")
    assert [one.uri for one in report.missing] == [f"samples/n/{i}" for i in range(20) if i not in GOOD]
    assert str(report.missing[0].error) == "KeyError: 0"
    assert report.residency.resident_objects == len(GOOD)
    assert str(report).startswith("14 of 20 are in the pool. Missing are ")


def test_a_prefetch_of_computed_samples_goes_on_without_them(pool: SamplePool) -> None:
    dataset = CachedDataset(Sevenths(), name="n", on_error="skip", pool=pool)  # type: ignore[arg-type]
    handle = dataset.prefetch(range(20), 0)
    assert handle.wait(60)
    (missing,) = handle.progress().missing
    assert (handle.staged, missing.chunks, missing.why) == (len(GOOD), 20 - len(GOOD), "KeyError: 0")


def test_copies_count_for_themselves(pool: SamplePool) -> None:
    dataset = CachedDataset(Sevenths(), name="n", on_error="skip", pool=pool)  # type: ignore[arg-type]
    dataset.__getitems__([0, 1])
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.skipped == 1
    copy.__getitems__([0, 1])
    assert (copy.skipped, dataset.skipped) == (2, 1)
