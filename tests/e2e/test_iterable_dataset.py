"""CachedIterableDataset over a real embedded pool and a real S3: formats, loaders, workers, resuming."""

from __future__ import annotations

import json
import pickle
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e.sharded import COUNT, KINDS, Number, dataset_of, write_shards
from tests.unit import shards
from torchcache.cli.app import run

# More workers than the processors of a small machine are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


def numbers(loader: Any) -> list[int]:
    return [int(n) for batch in loader for n in batch]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_format(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: bool) -> None:
    pattern = write_shards(tmp_path, kind)

    def make(**settings: Any) -> tc.CachedIterableDataset:
        return dataset_of(pattern, pool, shuffle=shuffle, **settings)

    dataset = make(window=16)
    first = list(dataset)
    assert sorted(first) == list(range(COUNT))
    assert (first == list(range(COUNT))) is not shuffle
    dataset.set_epoch(1)
    assert (list(dataset) == first) is not shuffle
    stop = random.Random(kind).randrange(COUNT)
    iterator = iter(dataset)
    front = [next(iterator) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(dataset.state_dict()))
    rest = list(iterator)
    again = make(window=16)
    again.load_state_dict(state)
    assert list(again) == rest
    assert len(list(again)) == COUNT  # the next iteration is a whole one
    halves = [make(window=16, num_replicas=2, rank=rank, uneven="keep") for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert sorted([*front, *halves[0], *halves[1]]) == list(range(COUNT))


# ---- workers and ranks ----


def batches_of(loader: Any) -> list[list[int]]:
    return [[int(n) for n in batch] for batch in loader]


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One kind for each way of reading: records, blocks, streams."""
    return {
        kind: write_shards(tmp_path_factory.mktemp(kind), kind) for kind in ("tar", "parquet", "jsonl.zst")
    }


KIND = pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl.zst"])


@pytest.mark.parametrize(("kind", "workers", "ranks"), [("tar", 2, 1), ("jsonl.zst", 3, 2)])
def test_loaders_read_every_sample_once(
    pool: tc.Pool, patterns: dict[str, str], kind: str, workers: int, ranks: int
) -> None:
    had: list[int] = []
    for rank in range(ranks):
        dataset = tc.CachedIterableDataset(
            patterns[kind],
            shuffle=True,
            transform=Number(kind),
            uneven="keep",
            num_replicas=ranks,
            rank=rank,
            pool=pool,
        )
        had += numbers(DataLoader(dataset, batch_size=8, num_workers=workers))
    assert sorted(had) == list(range(COUNT))


QUICK = [("tar", 0), ("jsonl.zst", 1), ("parquet", 2), ("tar", 4)]
"""Each kind, and each number of workers."""


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        pytest.param(kind, workers, marks=[] if (kind, workers) in QUICK else pytest.mark.long)
        for kind in ("tar", "parquet", "jsonl.zst")
        for workers in (0, 1, 2, 4)
    ],
)
def test_a_stateful_loader_resumes_exactly(
    pool: tc.Pool, patterns: dict[str, str], kind: str, workers: int
) -> None:
    """Also by others: another number of workers, and of ranks, with a plain DataLoader."""

    def dataset(**settings: Any) -> tc.CachedIterableDataset:
        made = tc.CachedIterableDataset(
            patterns[kind], shuffle=True, transform=Number(kind), window=16, pool=pool, **settings
        )
        made.set_epoch(3)
        return made

    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(dataset(), batch_size=4, num_workers=workers)

    whole = batches_of(loader())
    assert sorted(n for batch in whole for n in batch) == list(range(COUNT))
    stop = random.Random(f"{kind} {workers}").randrange(1, len(whole))
    interrupted = loader()
    iterator = iter(interrupted)
    front = [[int(n) for n in next(iterator)] for _ in range(stop)]
    state = pickle.loads(pickle.dumps(interrupted.state_dict()))
    del iterator
    resumed = loader()
    resumed.load_state_dict(state)
    assert front + batches_of(resumed) == whole
    assert batches_of(resumed) == whole  # the next epoch is a whole one

    had = sorted(n for batch in front for n in batch)
    rest = sorted(set(range(COUNT)) - set(had))
    other = dataset()
    other.load_state_dict(state)
    assert sorted(numbers(DataLoader(other, batch_size=4, num_workers=3))) == rest
    found: list[int] = []
    for rank in range(2):
        half = dataset(num_replicas=2, rank=rank, uneven="keep")
        half.load_state_dict(state)
        found += numbers(DataLoader(half, batch_size=3, num_workers=workers and 1))
    assert sorted(found) == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_an_epochs_end(pool: tc.Pool, patterns: dict[str, str], workers: int) -> None:
    """Nothing is left of it. A loader then begins the next epoch, and it is the one that was said."""

    def make() -> tuple[tc.CachedIterableDataset, StatefulDataLoader[Any]]:
        dataset = dataset_of(patterns["tar"], pool, shuffle=True)
        return dataset, StatefulDataLoader(dataset, batch_size=8, num_workers=workers)

    first, loader = make()
    first.set_epoch(4)
    batches_of(loader)
    state = loader.state_dict()
    first.set_epoch(5)
    following = batches_of(loader)

    second, again = make()
    again.load_state_dict(state)
    second.set_epoch(5)
    assert batches_of(again) == following

    third, _ = make()
    third.load_state_dict(state)
    assert list(third) == []
    third.set_epoch(5)
    assert sorted(third) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_plain_loader_resumes_by_the_number_of_batches(
    pool: tc.Pool, patterns: dict[str, str], workers: int
) -> None:
    def dataset() -> tc.CachedIterableDataset:
        return tc.CachedIterableDataset(
            patterns["tar"], shuffle=True, transform=Number("tar"), pool=pool, seed=5
        )

    for stop in (0, 1, 5, 11, 1000):
        first = dataset()
        iterator = iter(DataLoader(first, batch_size=4, num_workers=workers))
        front = [int(n) for batch, _ in zip(iterator, range(stop), strict=False) for n in batch]
        if workers:
            with pytest.raises(tc.ConfigurationError, match="only the DataLoader's workers know"):
                first.state_dict()
        state = first.state_after(batches=stop, batch_size=4, num_workers=workers)
        second = dataset()
        second.load_state_dict(state)
        resumed = DataLoader(second, batch_size=4, num_workers=2)
        assert sorted(front + numbers(resumed)) == list(range(COUNT))
        assert sorted(numbers(resumed)) == list(range(COUNT))  # a state is good for one pass


def test_told_the_batch_size_workers_change_nothing(pool: tc.Pool, patterns: dict[str, str]) -> None:
    def batches(workers: int) -> list[list[int]]:
        dataset = tc.CachedIterableDataset(
            patterns["tar"], shuffle=True, transform=Number("tar"), batch_size=8, pool=pool
        )
        loader = DataLoader(dataset, batch_size=8, num_workers=workers)
        assert len(loader) == 13
        return batches_of(loader)

    alone = batches(0)
    assert batches(1) == batches(2) == batches(4) == alone


def test_ranks_are_even_and_global_batches_the_same(pool: tc.Pool, patterns: dict[str, str]) -> None:
    def rank_of(rank: int, ranks: int, uneven: Any = "pad") -> list[int]:
        return list(
            tc.CachedIterableDataset(
                patterns["tar"],
                shuffle=True,
                transform=Number("tar"),
                num_replicas=ranks,
                rank=rank,
                uneven=uneven,
                pool=pool,
            )
        )

    alone = rank_of(0, 1)
    four = [rank_of(rank, 4) for rank in range(4)]
    assert [len(share) for share in four] == [25] * 4
    dealt = [n for step in zip(*four, strict=True) for n in step]
    assert dealt == alone + alone[:3]
    assert [len(rank_of(rank, 4, "drop")) for rank in range(4)] == [24] * 4
    assert sorted(len(rank_of(rank, 4, "keep")) for rank in range(4)) == [24, 24, 24, 25]


def test_a_spawned_worker_is_not_sent_where_records_begin(pool: tc.Pool, tmp_path: Path) -> None:
    """Its memory doesn't grow with their number."""
    sizes = []
    for count in (1_000, 21_000):
        (tmp_path / f"{count:06d}.jsonl").write_bytes(b"1\n" * count)
        dataset = tc.CachedIterableDataset(f"{tmp_path}/{count:06d}.jsonl", shuffle=True, pool=pool)
        sizes.append(len(pickle.dumps(dataset)))
        assert len(list(pickle.loads(pickle.dumps(dataset)))) == count
    assert sizes[1] - sizes[0] < 100


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_persistent_workers_see_the_epoch(pool: tc.Pool, patterns: dict[str, str], method: str) -> None:
    dataset = tc.CachedIterableDataset(
        patterns["tar"], shuffle=True, transform=Number("tar"), pool=pool, batch_size=10
    )
    workers = 2 if method == "fork" else 1  # spawning takes longer than all the rest
    loader = DataLoader(
        dataset, batch_size=10, num_workers=workers, persistent_workers=True, multiprocessing_context=method
    )
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen.append(numbers(loader))
        assert sorted(seen[-1]) == list(range(COUNT))
    assert len({tuple(s) for s in seen}) == 3
    dataset.set_epoch(1)
    assert numbers(loader) == seen[1]
    dataset.load_state_dict(dataset.state_after(batches=3, batch_size=10, num_workers=workers))
    with pytest.raises(tc.ConfigurationError, match="persistent workers had it already"):
        numbers(loader)


def test_the_rank_is_that_of_the_environment(pool: tc.Pool, patterns: dict[str, str]) -> None:
    with environment({"RANK": "1", "WORLD_SIZE": "3"}):
        dataset = tc.CachedIterableDataset(patterns["tar"], transform=Number("tar"), pool=pool)
        assert list(dataset)[:3] == [1, 4, 7]
        assert len(dataset) == 33


def test_states_of_others_are_refused(pool: tc.Pool, patterns: dict[str, str]) -> None:
    def make(kind: str = "tar", **settings: Any) -> tc.CachedIterableDataset:
        return tc.CachedIterableDataset(patterns[kind], pool=pool, **settings)

    state = make().state_dict()
    for other in (make("parquet"), make(shuffle=True), make(window=3)):
        with pytest.raises(tc.ConfigurationError, match="saved over other samples"):
            other.load_state_dict(state)
    for changed, message in (
        ({"torchcache": 9}, "another version"),
        ({"left": [3, 1, 0]}, "damaged"),
        ({"count": -1}, "'count' is -1"),
        ({"split": [0, 1, 1, 0]}, "'split' is"),
        ({"split": [1, 2, 1, 0]}, "1 of 2 workers"),
    ):
        with pytest.raises(tc.ConfigurationError, match=message):
            make().load_state_dict({**state, **changed})
    for strange in ({}, {"dataset_state": None}, {"_snapshot": 1}):
        with pytest.raises(tc.ConfigurationError, match="neither a state"):
            make().load_state_dict(strange)
    with pytest.raises(tc.ConfigurationError, match="snapshot_every_n_steps=1"):
        make().load_state_dict({"_steps_since_snapshot": 2, "_snapshot": {}})


# ---- sources ----


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()
    for i in range(4):
        body = shards.jsonl(range(10 * i, 10 * i + 10))
        s3.client.put_object(Bucket=name, Key=f"data/a/{i:03d}.jsonl", Body=body)
    s3.client.put_object(Bucket=name, Key="data/readme.txt", Body=b"no shard")
    return name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/a/{000..003}.jsonl", [0, 1, 2, 3]),
        ("data/a/{000..003..2}.jsonl", [0, 2]),
        ("data/a/00{3,1}.jsonl", [3, 1]),
        ("data/*/*.jsonl", [0, 1, 2, 3]),
        ("data/**/00[12].jsonl", [1, 2]),
        ("data/a/00?.jsonl", [0, 1, 2, 3]),
        ("data", [0, 1, 2, 3]),
        ("data/a/", [0, 1, 2, 3]),
        ("data/a/002.jsonl", [2]),
        (["data/a/002.jsonl", "data/a/{000..001}.jsonl"], [2, 0, 1]),
    ],
)
def test_sources_in_s3(bucket: str, source: str | list[str], expected: list[int]) -> None:
    uris = f"s3://{bucket}/{source}" if isinstance(source, str) else [f"s3://{bucket}/{s}" for s in source]
    with tc.LocalPool() as own:
        dataset = tc.CachedIterableDataset(uris, transform=Number("jsonl"), pool=own)
        assert list(dataset) == [10 * i + n for i in expected for n in range(10)]


def test_sources_that_are_none(bucket: str) -> None:
    with tc.LocalPool() as own:
        for source, error, message in (
            (f"s3://{bucket}/data/a/9.jsonl", tc.ObjectNotFound, "no shard .*/data/a/9.jsonl"),
            (f"s3://{bucket}/data/a/00{{0..9}}.jsonl", tc.ObjectNotFound, "no shard .*/data/a/004.jsonl"),
            (f"s3://{bucket}/x*.tar", tc.ObjectNotFound, r"no object under .* matches s3://.*/x\*.tar"),
            (f"s3://{bucket}/data/readme.txt", tc.ConfigurationError, "says no format"),
            ([], tc.ConfigurationError, "at least one shard"),
            (7, tc.ConfigurationError, "not int"),
            (f"s3://{bucket}/{{0..99999999}}", tc.ConfigurationError, "more than 1,000,000"),
        ):
            with pytest.raises(error, match=message):
                tc.CachedIterableDataset(source, pool=own)  # type: ignore[arg-type]


# ---- what goes wrong ----


def test_a_shard_that_changed_is_named(s3: SeaweedFS, bucket: str) -> None:
    with tc.LocalPool() as own:
        pattern = f"s3://{bucket}/data/a/*.jsonl"
        dataset = tc.CachedIterableDataset(pattern, transform=Number("jsonl"), pool=own)
        s3.client.put_object(Bucket=bucket, Key="data/a/001.jsonl", Body=shards.jsonl(range(7)))
        own.evict(f"s3://{bucket}/data/a")
        iterator = iter(dataset)
        with pytest.raises(tc.ObjectChanged, match=rf"s3://{bucket}/data/a/001.jsonl has changed since"):
            list(iterator)
        loader = DataLoader(dataset, batch_size=4, num_workers=1)
        with pytest.raises(tc.ObjectChanged, match=r"001.jsonl has changed since"):
            list(loader)
        again = tc.CachedIterableDataset(pattern, transform=Number("jsonl"), pool=own)
        assert list(again)[10:17] == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_raised_or_skipped(
    pool: tc.Pool, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = [shards.tf_frame(bytes([n])) for n in range(20)]
    bad = bytearray(good[7])
    bad[12] ^= 1
    (tmp_path / "x.tfrecord").write_bytes(b"".join([*good[:7], bytes(bad), *good[8:]]))

    def dataset(**settings: Any) -> tc.CachedIterableDataset:
        return tc.CachedIterableDataset(f"{tmp_path}/x.tfrecord", pool=pool, transform=only_even, **settings)

    with pytest.raises(ValueError, match="odd") as caught:
        list(DataLoader(dataset(), batch_size=None, num_workers=workers))
    read = "".join(traceback.format_exception(caught.value))
    assert f"raised for record 1 of file://{tmp_path}/x.tfrecord" in read
    skipping = dataset(on_error="skip")
    found = list(DataLoader(skipping, batch_size=None, num_workers=workers))
    assert sorted(found) == list(range(0, 20, 2))
    assert skipping.skipped == 10
    if not workers:
        assert f"record 7 of file://{tmp_path}/x.tfrecord is skipped: IntegrityError" in caplog.text
        assert f"record 9 of file://{tmp_path}/x.tfrecord is skipped: ValueError" in caplog.text


def only_even(sample: bytes) -> int:
    if sample[0] % 2:
        raise ValueError(f"{sample[0]} is odd")
    return sample[0]


def test_a_damaged_shard_is_refused_when_it_is_indexed(pool: tc.Pool, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(shards.tar(range(5))[:3000])
    with pytest.raises(tc.IntegrityError, match=r"x.tar.* cut short"):
        tc.CachedIterableDataset(f"{tmp_path}/x.tar", pool=pool)


# ---- indices ----


def test_what_was_indexed_before_a_damaged_shard_is_kept(
    pool: tc.Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And indexing shows how far it is, which may take long."""
    paths = [str(tmp_path / f"{n}.tar") for n in range(3)]
    for path, data in zip(paths, (shards.tar(range(5)), shards.tar(range(6)), b"none"), strict=True):
        Path(path).write_bytes(data)
    with pytest.raises(tc.IntegrityError, match=r"2\.tar"):
        tc.CachedIterableDataset(paths, pool=pool)
    assert tc.CachedIterableDataset(paths[:2], pool=pool)._records.made == 0  # type: ignore[union-attr]
    Path(paths[2]).write_bytes(shards.tar(range(7)))
    assert capfd.readouterr().err == "", "no terminal, no bar"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert len(tc.CachedIterableDataset(paths, pool=pool)) == 18
    assert "1/1 shards" in capfd.readouterr().err


def test_an_index_is_made_once_for_a_version(s3: SeaweedFS, bucket: str) -> None:
    with tc.LocalPool() as own:
        pattern = f"s3://{bucket}/data/a/*.jsonl"

        def made() -> int:
            return tc.CachedIterableDataset(pattern, pool=own)._records.made

        assert made() == 4
        assert made() == 0
        s3.client.put_object(Bucket=bucket, Key="data/a/001.jsonl", Body=shards.jsonl(range(7)))
        assert made() == 1
        own.evict("samples:torchcache-index@1")
        assert made() == 4


def test_the_command_makes_it_ahead(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the embedded pool, which a dataset without pool= uses too."""
    pattern = f"s3://{bucket}/data/a/*.jsonl"
    for made in (4, 0):
        assert run(["index", "--json", pattern]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["shards"], found["records"], found["indexed"], found["access"]) == (
            4,
            40,
            made,
            ["records"],
        )
    assert tc.CachedIterableDataset(pattern)._records.made == 0  # type: ignore[union-attr]
    assert run(["index", f"s3://{bucket}/nothing.tar"]) == 1
    assert "there is no shard" in capsys.readouterr().err
    assert run(["index", f"s3://{bucket}/data/readme.txt"]) == 2


def test_settings_are_checked(pool: tc.Pool, patterns: dict[str, str]) -> None:
    for settings, message in (
        ({"shuffle": "rows"}, "shuffle='rows'"),
        ({"uneven": "cut"}, "uneven='cut'"),
        ({"on_error": "log"}, "on_error='log'"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"window": 0}, "window=0"),
        ({"seed": "x"}, "seed='x'"),
        ({"rank": 3}, "give both"),
        ({"rank": 3, "num_replicas": 3}, "0 <= rank < num_replicas"),
    ):
        with pytest.raises(tc.ConfigurationError, match=message):
            tc.CachedIterableDataset(patterns["tar"], pool=pool, **settings)
    with pytest.raises(tc.ConfigurationError, match="shuffle='records' needs"):
        tc.CachedIterableDataset(patterns["jsonl.zst"], shuffle="records", pool=pool)
    forced = tc.CachedIterableDataset(
        patterns["parquet"], shuffle="records", transform=Number("parquet"), pool=pool
    )
    assert sorted(forced) == list(range(COUNT))


def test_stage_and_residency(bucket: str) -> None:
    with tc.LocalPool() as own:
        dataset = tc.CachedIterableDataset(f"s3://{bucket}/data/a/*.jsonl", pool=own)
        report = dataset.stage()
        assert (report.complete, report.residency.objects, str(report)) == (True, 4, "all 4 are in the pool")
        assert dataset.residency().fraction == 1.0
        assert "4 shards of jsonl under" in repr(dataset) and f"s3://{bucket}/data/a, 40 samples" in repr(
            dataset
        )


def test_a_stage_lists_the_shards_that_are_missing(s3: SeaweedFS, bucket: str) -> None:
    with tc.LocalPool() as own:
        dataset = tc.CachedIterableDataset(f"s3://{bucket}/data/a/*.jsonl", pool=own)
        own.evict(f"s3://{bucket}/data/a")
        s3.client.delete_object(Bucket=bucket, Key="data/a/001.jsonl")
        report = dataset.stage(progress=False, on_missing="report")
        (missing,) = report.missing
        assert (missing.uri, type(missing.error)) == (f"s3://{bucket}/data/a/001.jsonl", tc.ObjectNotFound)
        assert str(report).startswith("3 of 4 are in the pool. Missing are 1 at ")
        with pytest.raises(tc.ObjectNotFound, match="001"):
            dataset.stage(progress=False)


@KIND
def test_samples_are_as_their_users_know_them(pool: tc.Pool, patterns: dict[str, str], kind: str) -> None:
    first = next(iter(tc.CachedIterableDataset(patterns[kind], pool=pool)))
    url = "file://" + patterns["tar"].replace("{0..4}", "0")
    assert (
        first
        == {
            "tar": {"__key__": "folder/000000", "__url__": url, "txt": b"0", "data.bin": b""},
            "parquet": {"n": 0, "text": "t0"},
            "jsonl.zst": {"n": 0, "text": ""},
        }[kind]
    )
    assert not torch.is_tensor(first)
