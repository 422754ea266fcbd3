"""What a user's own code raises is raised as it is, and says of which sample it was."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset, CachedIterableDataset
from torchcache.data.naming import say_which
from torchcache.errors import IntegrityError, UnsupportedSample

__all__ = ["pool"]


def files(pool: SamplePool, **options: Any) -> CachedDataset:
    for i in range(4):
        pool.put(f"s3://b/d/{i}", b"four" if i == 2 else b"%04d" % i)
    return CachedDataset.from_files("s3://b/d", pool=pool, **options)  # type: ignore[arg-type]


def number_of(data: Any) -> int:
    return int(bytes(data))


def told(error: BaseException) -> str:
    """What the user reads."""
    return "".join(traceback.format_exception(error))


def raised(dataset: Any, indices: list[int], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        dataset.__getitems__(indices)
    assert caught.type is kind
    return told(caught.value)


@pytest.mark.parametrize("where", ["decode", "transform"])
def test_files_are_named_by_index_and_uri(pool: SamplePool, where: str) -> None:
    dataset = files(pool, **{where: number_of})
    assert "raised for sample 2, s3://b/d/2" in raised(dataset, [3, 2, 0])
    with pytest.raises(ValueError, match="invalid literal") as caught:
        dataset[-2]
    assert "raised for sample 2, s3://b/d/2" in told(caught.value)
    assert dataset.__getitems__([3, 1]) == [3, 1]


def test_records_are_named_by_their_number_in_a_file(pool: SamplePool) -> None:
    dataset = files(pool, record_bytes=2, decode=number_of)
    assert "raised for sample 5, record 1 of s3://b/d/2" in raised(dataset, [0, 5, 4])


@pytest.mark.forks
@pytest.mark.parametrize("workers", [0, 1])
def test_the_name_comes_home_from_a_loaders_worker(pool: SamplePool, workers: int) -> None:
    loader = DataLoader(files(pool, decode=number_of), batch_size=4, num_workers=workers)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        list(loader)
    assert "torchcache: raised for sample 2, s3://b/d/2" in told(caught.value)


class Thirds(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            raise KeyError("label")
        return {index} if index == 6 else torch.tensor(index)


class Together(Thirds):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def test_computed_samples(pool: SamplePool) -> None:
    dataset = CachedDataset(Thirds(), name="n", pool=pool)  # type: ignore[arg-type]
    assert "raised for sample 3 of n@0" in raised(dataset, [0, 3, 1], KeyError)
    assert "raised for sample 6 of n@0" in raised(dataset, [5, 6], UnsupportedSample)
    odd = CachedDataset(Thirds(), name="n", transform=lambda n: 1 // int(n), pool=pool)  # type: ignore[arg-type]
    for _ in ("computed", "kept"):
        assert "raised for sample 0 of n@0" in raised(odd, [1, 0], ZeroDivisionError)


def test_samples_that_are_computed_together(pool: SamplePool) -> None:
    dataset = CachedDataset(Together(), name="n", pool=pool)  # type: ignore[arg-type]
    assert "raised for one of samples 2, 3, 4 of n@0" in raised(dataset, [2, 3, 4], KeyError)
    assert "raised for sample 3 of n@0" in raised(dataset, [3], KeyError)
    many = raised(dataset, [*range(12)], KeyError)
    assert "raised for one of samples 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of n@0" in many


def test_a_decode_of_kept_samples(pool: SamplePool) -> None:
    def dataset(decode: Callable[[memoryview], Any]) -> CachedDataset:
        return CachedDataset(
            [0, 1, 2],
            name="n",
            encode=lambda number: b"%d" % number,
            decode=decode,
            pool=pool,  # type: ignore[arg-type]
        )

    def no_one(record: memoryview) -> int:
        return 1 // (int(bytes(record)) - 1)

    assert dataset(number_of).__getitems__([0, 1, 2]) == [0, 1, 2]
    assert "raised for sample 1 of n@0" in raised(dataset(no_one), [2, 1, 0], ZeroDivisionError)


class Stream(IterableDataset[Any]):
    def __init__(self, bad: Any) -> None:
        self._bad = bad

    def __iter__(self) -> Iterator[Any]:
        yield from (0, 1)
        if self._bad is None:
            raise KeyError("label")
        yield self._bad


@pytest.fixture
def iterable_pool(pool: SamplePool, monkeypatch: pytest.MonkeyPatch) -> SamplePool:
    monkeypatch.setattr("torchcache.data.iterable.connect", lambda given: given)
    return pool


def iterated(pool: SamplePool, bad: Any, **options: Any) -> Iterator[Any]:
    return iter(CachedIterableDataset(Stream(bad), name="n", pool=pool, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "kind", "options"),
    [
        (None, KeyError, {}),
        ({2}, UnsupportedSample, {}),
        ("two", ValueError, {"transform": int}),
        ("two", ValueError, {"transform": int, "num_replicas": 2, "rank": 1}),
    ],
)
def test_a_wrapped_iterable(
    iterable_pool: SamplePool, bad: Any, kind: type[Exception], options: dict[str, Any]
) -> None:
    samples = iterated(iterable_pool, bad, **options)
    assert [next(samples), next(samples)] == [0, 1]
    with pytest.raises(kind) as caught:
        next(samples)
    counts = ", as rank 1 and worker 0 count" if "rank" in options else ""
    assert f"raised for sample 2 of samples:n@0{counts}\n" in told(caught.value)


class Frozen(Exception):
    """Takes no note."""

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError("frozen")


def test_no_name_stands_in_the_errors_way() -> None:
    frozen = Frozen("as it was")
    say_which(frozen, lambda: "sample 1")
    assert told(frozen).endswith("as it was\n")

    def nameless() -> str:
        raise OSError("no server")

    error = json.JSONDecodeError("bad", "{", 1)
    say_which(error, nameless)
    assert told(error).endswith("bad: line 1 column 2 (char 1)\n")
    known = IntegrityError("s3://b/1 is damaged")
    say_which(known, lambda: "s3://b/1")
    assert told(known).endswith("s3://b/1 is damaged\n")
