"""CachedDataset around a dataset, over a pool in memory: computed once, and training goes on whatever the pool does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    OutOfSpace,
    ServerUnavailable,
    TorchCacheError,
    UnsupportedSample,
)

__all__ = ["pool"]

LENGTH = 20


class Squares(Dataset[dict[str, Any]]):
    """Counts how often it computes which sample."""

    def __init__(self) -> None:
        self.computed: Counter[int] = Counter()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.computed[index] += 1
        return {"x": torch.full((3,), index), "y": np.arange(index), "name": f"#{index}"}


class Batched(Squares):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.batches.append(list(indices))
        return [self[i] for i in indices]


class Other(Dataset[Any]):
    """Returns what it is given."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def cached(pool: SamplePool, dataset: Any, name: str | None = "squares", **options: Any) -> CachedDataset:
    return CachedDataset(dataset, name=name, pool=pool, **options)  # type: ignore[arg-type]


def numbers(batch: list[dict[str, Any]]) -> list[int]:
    assert [s["name"] for s in batch] == [f"#{len(s['y'])}" for s in batch]
    return [int(s["x"][0]) for s in batch]


def test_every_sample_is_computed_once(pool: SamplePool) -> None:
    source = Squares()
    for _ in range(3):
        dataset = cached(pool, source)
        for start in range(0, LENGTH, 8):
            wanted = list(range(start, min(start + 8, LENGTH)))
            assert numbers(dataset.__getitems__(wanted)) == wanted
    assert source.computed == dict.fromkeys(range(LENGTH), 1)
    assert pool.namespaces == {"samples:squares@0"}
    assert [len(ids) for ids in pool.writes] == [8, 8, 4]  # one write a batch
    assert str(pool.writes[0][3]) == "samples/squares/3@0"


def test_only_what_is_missing_is_computed_by_getitems_if_there_is_one(pool: SamplePool) -> None:
    source = Batched()
    dataset = cached(pool, source)
    dataset.__getitems__([2, 4])
    pool.reads.clear()
    assert numbers(dataset.__getitems__([5, 4, -1, 2, 5])) == [5, 4, 19, 2, 5]
    assert source.batches == [[2, 4], [5, 19]]
    assert [len(call) for call in pool.reads] == [4]


def test_a_getitems_that_loses_samples_is_told_so(pool: SamplePool) -> None:
    source = Batched()
    source.__class__ = type("Losing", (Batched,), {"__getitems__": lambda self, indices: []})
    with pytest.raises(ConfigurationError, match="__getitems__ of Losing returned 0 samples for 2 indices"):
        cached(pool, source).__getitems__([1, 2])


def test_all_epochs_are_the_same_and_nobody_shares_memory(pool: SamplePool) -> None:
    source = Other(torch.arange(6).reshape(2, 3).t(), torch.zeros(3))
    dataset = cached(pool, source)
    first, again = dataset.__getitems__([0, 0])
    later = dataset[0]
    assert first.stride() == again.stride() == later.stride()
    first.zero_()
    later.zero_()
    assert torch.equal(again, source.samples[0])
    assert torch.equal(dataset[0], source.samples[0])


def test_transform_runs_after_the_cache_each_time(pool: SamplePool) -> None:
    calls: list[str] = []
    dataset = cached(
        pool, Squares(), transform=lambda sample: calls.append(sample["name"]) or sample["name"] + "!"
    )
    assert [dataset[1], dataset[1]] == ["#1!", "#1!"]
    assert calls == ["#1", "#1"]


def test_another_version_or_name_never_sees_the_old_samples(pool: SamplePool) -> None:
    sources = [Squares() for _ in range(5)]
    options: list[dict[str, Any]] = [
        {},
        {"version": 1},
        {"version": "2"},
        {"name": "n"},
        {"name": "n", "version": 1},
    ]
    for source, option in zip(sources, options, strict=True):
        cached(pool, source, **option)[3]
        assert source.computed == {3: 1}
    assert len(pool.samples) == 5


@pytest.mark.parametrize("error", [OutOfSpace("full"), ServerUnavailable("away"), IntegrityError("damaged")])
def test_a_write_that_fails_does_not_fail_training(
    pool: SamplePool, error: TorchCacheError, caplog: pytest.LogCaptureFixture
) -> None:
    source = Squares()
    dataset = cached(pool, source)
    pool.write_error = error
    for _ in range(3):
        assert numbers(dataset.__getitems__([1, 2])) == [1, 2]
    assert source.computed == {1: 3, 2: 3}
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(error) in warnings[0].getMessage()
    assert repr(dataset).endswith("20 samples, 6 could not be kept)")
    pool.write_error = None
    dataset.__getitems__([1, 2])
    dataset.__getitems__([1, 2])
    assert source.computed == {1: 4, 2: 4}


def test_a_write_refused_for_good_is_raised(pool: SamplePool) -> None:
    pool.write_error = ConfigurationError("the server refused the token")
    with pytest.raises(ConfigurationError, match="refused the token"):
        cached(pool, Squares())[0]


@pytest.mark.parametrize("whole_call", [False, True])
def test_an_unreachable_pool_is_computed_around_and_not_written_to(
    pool: SamplePool, whole_call: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Squares()
    dataset = cached(pool, source)
    pool.read_error = ServerUnavailable("nobody there")
    if whole_call:
        monkeypatch.setattr(pool, "read_each", lambda *_, **__: (_ for _ in ()).throw(pool.read_error))
    assert numbers(dataset.__getitems__([1, 2])) == [1, 2]
    assert pool.writes == []
    assert "nobody there" in caplog.text


def test_a_damaged_sample_is_computed_again(pool: SamplePool) -> None:
    source = Squares()
    dataset = cached(pool, source)
    pool.read_error = IntegrityError("bits flipped")
    assert numbers(dataset.__getitems__([1])) == [1]
    assert len(pool.writes) == 1


def test_a_refused_read_is_raised_before_anything_is_computed(pool: SamplePool) -> None:
    source = Squares()
    pool.read_error = ConfigurationError("the server refused the token")
    with pytest.raises(ConfigurationError, match="refused the token"):
        cached(pool, source)[0]
    assert not source.computed


def test_a_stored_sample_of_an_unknown_format_is_a_miss(
    pool: SamplePool, caplog: pytest.LogCaptureFixture
) -> None:
    source = Squares()
    dataset = cached(pool, source)
    dataset[1]
    pool.samples = {k: b"TCS9" + v[4:] for k, v in pool.samples.items()}  # F40
    assert numbers(dataset.__getitems__([1, 1])) == [1, 1]
    assert source.computed == {1: 2}
    assert "computed again" in caplog.text


def test_the_users_own_encoding(pool: SamplePool) -> None:
    seen: list[memoryview] = []

    def decode(data: memoryview) -> set[int]:
        seen.append(data)
        return set(data)

    source = Other({1, 2}, {3})
    dataset = cached(pool, source, "sets", encode=lambda sample: bytes(sorted(sample)), decode=decode)
    for _ in range(2):
        assert dataset.__getitems__([0, 1, 0]) == [{1, 2}, {3}, {1, 2}]
    assert all(view.readonly for view in seen)
    with pytest.raises(ConfigurationError, match=r"stored with encode=.*another name= or version="):
        cached(pool, source, "sets")[0]


def test_what_has_no_encoding_is_a_type_error_with_its_path(pool: SamplePool) -> None:
    dataset = cached(pool, Other({"image": [torch.zeros(1), {1}]}))
    with pytest.raises(TypeError, match=r"sample\['image'\]\[1\] is a set.*encode= and decode="):
        dataset[0]
    with pytest.raises(UnsupportedSample):
        dataset[0]


def test_the_default_name_is_a_fingerprint(pool: SamplePool) -> None:
    tensors = [torch.arange(4), torch.arange(4), torch.arange(1, 5)]
    names = [repr(cached(pool, TensorDataset(t), None)) for t in tensors]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("CachedDataset(TensorDataset, name='TensorDataset-4-")
    assert names[0].endswith("', version='0': 4 samples)")
    with pytest.raises(
        ConfigurationError, match=r"dataset\.samples\[0\] is a builtins\.function.*Pass name="
    ):
        cached(pool, Other(lambda: 0), None)


def test_datasets_that_wrap_datasets(pool: SamplePool) -> None:
    inner = TensorDataset(torch.arange(10))
    both = ConcatDataset([Subset(inner, [1, 2, 3]), inner])
    dataset = cached(pool, both, None)
    for _ in range(2):
        assert [int(s[0]) for s in dataset.__getitems__([0, 2, 3, -1])] == [1, 3, 0, 9]


def test_plain_lists_are_map_style_too(pool: SamplePool) -> None:
    assert cached(pool, [5, 6, 7], None)[-1] == 7


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Endless(), {}, "Endless has none"),
        (5, {}, "int has none"),
        ("s3://bucket/data", {}, "use CachedDataset.from_files"),
        ([1], {"name": ""}, "name= must be a str"),
        ([1], {"name": 5}, "name= must be a str"),
        ([1], {"version": ""}, "version= must not be empty"),
        ([1], {"version": "save:1"}, "version= must not be empty or start with 'save:'"),
        ([1], {"encode": bytes}, "encode= and decode= belong together"),
        ([1], {"decode": bytes}, "encode= and decode= belong together"),
        ([1], {"encode": bytes, "decode": bytes, "name": None}, "pass name= too"),
    ],
)
def test_wrong_arguments_are_refused(
    pool: SamplePool, dataset: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        CachedDataset(dataset, pool=pool, **{"name": "n", **options})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_an_iterable_dataset_is_shown_its_class(pool: SamplePool) -> None:
    with pytest.raises(
        TypeError, match=r"Stream is an IterableDataset: wrap it in torchcache\.CachedIterableDataset"
    ):
        CachedDataset(Stream(), name="n", pool=pool)  # type: ignore[arg-type]


def test_a_data_loader_takes_it(pool: SamplePool) -> None:
    dataset = CachedDataset(TensorDataset(torch.arange(10), torch.ones(10, 2)), pool=pool)  # type: ignore[arg-type]
    for _ in range(2):
        batches = list(DataLoader(dataset, batch_size=4))
        assert torch.cat([b[0] for b in batches]).tolist() == list(range(10))
    assert [len(call) for call in pool.reads] == [4, 4, 2] * 2


def test_stage_computes_what_is_missing(pool: SamplePool, capfd: pytest.CaptureFixture[str]) -> None:
    source = Squares()
    dataset = cached(pool, source)
    dataset.__getitems__([0, 5, 19])
    assert dataset.residency().fraction == 3 / LENGTH
    dataset.stage(progress=False)
    assert source.computed == dict.fromkeys(range(LENGTH), 1)
    assert dataset.residency().fraction == 1.0
    assert all(
        e.length == 1 for call in pool.reads[1:] for e in call
    )  # no sample is read to see that it is there
    assert dataset.stage().complete
    assert capfd.readouterr().err == "", "no terminal, no bar"
    assert sum(source.computed.values()) == LENGTH


@pytest.mark.parametrize("which", ["read_error", "write_error"])
def test_staging_raises_what_training_lives_with(pool: SamplePool, which: str) -> None:
    setattr(pool, which, ServerUnavailable("away"))
    with pytest.raises(ServerUnavailable, match="away"):
        cached(pool, Squares()).stage(progress=False)


def test_a_position_over_other_samples_is_refused(pool: SamplePool) -> None:
    state = cached(pool, Squares()).state_dict()
    cached(pool, Squares()).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="version was '0', is '1'"):
        cached(pool, Squares(), version=1).load_state_dict(state)
    assert state == {"name": "squares", "version": "0", "count": LENGTH}


def test_computed_samples_have_no_keys(pool: SamplePool) -> None:
    with pytest.raises(ConfigurationError, match="only a dataset made by from_files has"):
        cached(pool, Squares()).keys()
