"""CachedDataset.from_files over a real embedded pool and a real S3: the ways it can go wrong, staging, resuming."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, StackDataset, random_split
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from torchcache.pool import Residency

FILES = 48


def payload(index: int) -> bytes:
    return np.random.default_rng(index).bytes(500 + 13 * index)


def key(index: int) -> str:
    return f"{index % 4}/{index:03d}.bin"


ORDER = sorted(range(FILES), key=key)


def decode(data: memoryview) -> torch.Tensor:
    assert data.readonly
    return torch.tensor([len(data), sum(data[:10])])


def head(sample: Any) -> Any:
    """Of equal size, so that samples can be stacked."""
    return sample[:500]


def make_bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()
    for i in range(FILES):
        s3.client.put_object(Bucket=name, Key=f"data/{key(i)}", Body=payload(i))
    s3.client.put_object(Bucket=name, Key="database/other.bin", Body=b"of another folder")
    return name


@pytest.fixture(scope="module")
def shared_bucket(s3_server: SeaweedFS) -> Iterator[str]:
    before = len(s3_server.buckets)
    yield make_bucket(s3_server)
    s3_server.remove_buckets(before)


@pytest.fixture
def bucket(s3: SeaweedFS, shared_bucket: str) -> str:
    """Only read from."""
    return shared_bucket


@pytest.fixture
def own_bucket(s3: SeaweedFS) -> str:
    """To be changed."""
    return make_bucket(s3)


def reads(pool: tc.Pool) -> int:
    return sum(store.read_requests for server in pool.status() for store in server.under_stores)


def test_samples_are_the_objects_in_order(bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data/", pattern="*.bin", pool=pool)
        assert dataset.keys() == [key(i) for i in ORDER]
        assert dataset.__getitems__(range(FILES)) == [payload(i) for i in ORDER]
        assert dataset[-1] == payload(ORDER[-1])
        assert repr(dataset).startswith(
            f"CachedDataset.from_files('s3://{bucket}/data', pattern='*.bin': 48 objects"
        )
        one = tc.CachedDataset.from_files(f"s3://{bucket}/data", pattern="3/*", pool=pool)
        assert len(one) == FILES // 4
        assert one.residency().fraction == 1.0  # what one dataset fetched serves the other


def test_torchs_own_datasets_around_one_in_workers(tmp_path: Path) -> None:
    """Each hands a batch on, or a sample, in its own way."""
    for number in range(20):
        (tmp_path / f"{number:02d}").write_bytes(b"%d" % (number * number))
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(str(tmp_path), decode=number_of, pool=pool)
        some, others = random_split(dataset, [13, 7], generator=torch.Generator().manual_seed(1))
        squares = [n * n for n in [*some.indices, *others.indices]]
        for around, expected in (
            (some, [[square] for square in squares[:13]]),
            (ConcatDataset([others, some]), [[square] for square in squares[13:] + squares[:13]]),
            (StackDataset(others, others.indices), [[n * n, n] for n in others.indices]),
            (
                StackDataset(ConcatDataset([some, others]), range(20)),
                [[square, at] for at, square in enumerate(squares)],
            ),
        ):
            loader = DataLoader(around, batch_size=3, num_workers=2)
            batches = [torch.stack(batch if isinstance(batch, list) else [batch]) for batch in loader]
            assert torch.cat(batches, 1).T.tolist() == expected
        assert dataset.residency().fraction == 1.0


def test_samples_are_in_order_where_a_folder_and_its_neighbour_begin_alike(s3: SeaweedFS) -> None:
    """Bytewise "a-b" comes before "a/x"; who lists folder by folder says it the other way round."""
    name = s3.make_bucket()
    for key in ("data/a/x", "data/a-b", "data/a.c/y"):
        s3.client.put_object(Bucket=name, Key=key, Body=key.encode())
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{name}/data", pool=pool)
        assert dataset.keys() == ["a-b", "a.c/y", "a/x"]
        assert dataset[2] == b"data/a/x"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_beside_a_used_pool(bucket: str, method: str) -> None:
    """The parent reads before, while and after its workers do, or its one that is spawned, which takes long."""
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", decode=decode, pool=pool)
        expected = [[len(payload(i)), sum(payload(i)[:10])] for i in ORDER]
        assert dataset[0].tolist() == expected[0]
        loader = DataLoader(
            dataset,
            batch_size=8,
            num_workers=2 if method == "fork" else 1,
            multiprocessing_context=method,
            persistent_workers=True,
        )
        for _ in range(2):
            seen = []
            for batch in loader:
                seen += batch.tolist()
                assert dataset[1].tolist() == expected[1]
            assert seen == expected


@pytest.mark.parametrize(("method", "output"), [("fork", "numpy"), ("fork", "tensor"), ("spawn", "tensor")])
def test_workers_that_reuse_their_buffers(bucket: str, method: str, output: Any) -> None:
    """More batches than the pool has room for, kept by the trainer while workers go on: none is written over."""
    with tc.LocalPool() as pool:
        buffers = tc.BufferPool("64KiB")
        dataset = tc.CachedDataset.from_files(
            f"s3://{bucket}/data", output=output, transform=head, buffers=buffers, pool=pool
        )
        expected = [list(payload(i)[:500]) for i in ORDER]
        mine = dataset[0]  # a buffer is out when the workers are forked
        loader = DataLoader(
            dataset,
            batch_size=5,
            num_workers=2 if method == "fork" else 1,
            multiprocessing_context=method,
            persistent_workers=True,
        )
        for _ in range(2):
            kept = list(loader)
            assert [row for batch in kept for row in batch.tolist()] == expected
        assert mine.tolist() == expected[0]


@pytest.mark.usefixtures("no_hedges")
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("output", ["bytes", "view", "numpy", "tensor"])
def test_a_batch_is_one_request_a_server(bucket: str, output: Any, servers: int) -> None:
    """With an index twice in it, too."""
    with tc.LocalPool(servers=servers) as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", output=output, pool=pool)
        dataset.stage(progress=False)
        indices = [*range(FILES), 3, 3, 0]
        before = pool.statistics()
        samples = dataset.__getitems__(indices)
        after = pool.statistics()
        assert [bytes(sample) for sample in samples] == [payload(ORDER[i]) for i in indices]
        assert after.read_calls - before.read_calls == servers
        assert after.extents - before.extents == len(indices)


def test_records_within_files(s3: SeaweedFS) -> None:
    """Ranges of objects of several chunks, by each lane's checksums of blocks."""
    name = s3.make_bucket()
    size, counts = 114_660, (40, 1, 75)
    files = [np.random.default_rng(i).bytes(size * count) for i, count in enumerate(counts)]
    for i, file in enumerate(files):
        s3.client.put_object(Bucket=name, Key=f"train/{i}.bin", Body=file)
    whole = b"".join(files)
    with tc.LocalPool(servers=2) as pool:
        dataset = tc.CachedDataset.from_files(
            f"s3://{name}/train", record_bytes=size, output="tensor", pool=pool
        )
        assert len(dataset) == sum(counts)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(2)).tolist()
        for _ in range(2):
            for sample, index in zip(dataset.__getitems__(order), order, strict=True):
                assert sample.numpy().tobytes() == whole[index * size : (index + 1) * size]
        assert dataset.residency().fraction == 1.0


def test_staged_files_need_no_s3(bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    total = sum(len(payload(i)) for i in range(FILES))
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", pool=pool)
        assert dataset.residency() == Residency(
            objects=FILES, resident_objects=0, bytes=total, resident_bytes=0
        )
        report = dataset.stage(progress=True)
        assert (report.complete, report.missing) == (True, ())
        assert "samples" not in capfd.readouterr().err, "no terminal, no bar"
        assert dataset.residency().fraction == 1.0
        before = reads(pool)
        assert before == FILES
        dataset.__getitems__(range(FILES))
        dataset.stage(progress=False)
        assert reads(pool) == before


def test_prefetch_fetches_this_epochs_samples(bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", pool=pool)
        sampler = RandomSampler(dataset, num_samples=20, generator=torch.Generator().manual_seed(3))
        handle = dataset.prefetch(sampler, 0)
        assert handle.wait(300)
        wanted = list(sampler)
        assert handle.staged == handle.total == len(set(wanted))
        before = reads(pool)
        dataset.__getitems__(wanted)
        assert reads(pool) == before
        assert handle.staged_bytes == sum(len(payload(ORDER[i])) for i in set(wanted))


def test_prefetch_goes_on_while_workers_are_forked_and_read(bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", decode=decode, pool=pool)
        for _ in range(3):
            handle = dataset.prefetch(RandomSampler(dataset), 0)
            loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork")
            assert sum(len(batch) for batch in loader) == FILES
            assert handle.wait(300)
        assert reads(pool) == FILES  # whoever asked first: nothing was fetched twice


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_the_right_sample(bucket: str, workers: int) -> None:
    with tc.LocalPool() as pool:

        def make() -> StatefulDataLoader[Any]:
            torch.manual_seed(5)
            dataset = tc.CachedDataset.from_files(f"s3://{bucket}/data", decode=decode, pool=pool)
            return StatefulDataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)

        whole = [batch.tolist() for batch in make()]
        interrupted, before = make(), []
        for batch in interrupted:
            before.append(batch.tolist())
            if len(before) == 5:
                break
        state = pickle.loads(pickle.dumps(interrupted.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        assert before + [batch.tolist() for batch in resumed] == whole


def test_an_object_that_vanished_or_changed(s3: SeaweedFS, own_bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{own_bucket}/data", pool=pool)
        kept = dataset[2]
        for index in (0, 2):
            s3.client.delete_object(Bucket=own_bucket, Key=f"data/{dataset.keys()[index]}")
        s3.client.put_object(Bucket=own_bucket, Key=f"data/{dataset.keys()[1]}", Body=b"other bytes")
        with pytest.raises(
            tc.ObjectNotFound, match=rf"s3://{own_bucket}/data/0/000.bin is gone since.*create it again"
        ):
            dataset[0]
        with pytest.raises(
            tc.ObjectChanged, match=rf"s3://{own_bucket}/data/0/004.bin has changed since.*create it"
        ):
            dataset[1]
        assert dataset[2] == kept  # what the pool holds is of the version listed


@pytest.mark.forks
def test_what_changes_under_a_running_epoch(s3: SeaweedFS, own_bucket: str) -> None:
    """Workers read it as it is now, or say what has changed; the next epoch is of what `refresh` finds."""

    def put(name: str, data: bytes) -> None:
        s3.client.put_object(Bucket=own_bucket, Key=f"data/{name}", Body=data)

    with tc.LocalPool() as pool:
        renewing, raising = (
            tc.CachedDataset.from_files(f"s3://{own_bucket}/data", on_change=on_change, pool=pool)
            for on_change in ("refresh", "raise")
        )
        running, other = (
            iter(DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list))
            for dataset in (renewing, raising)
        )
        had = next(running)  # workers are four batches ahead, of twelve
        next(other)
        names = renewing.keys()
        changed = {names[-1]: b"longer than before " * 100, names[-3]: b"", names[-6]: b"shorter"}
        for name, data in changed.items():
            put(name, data)
        put("9.bin", b"added")
        s3.client.delete_object(Bucket=own_bucket, Key=f"data/{names[0]}")

        expected = [changed.get(key(i), payload(i)) for i in ORDER]
        assert [*had, *(sample for batch in running for sample in batch)] == expected
        with pytest.raises(tc.ObjectChanged, match=rf"data/{names[-6]} has changed since"):
            list(other)

        found = renewing.refresh()
        assert (found.added, found.removed) == (("9.bin",), (names[0],))
        assert found.changed == tuple(sorted(changed))
        loader = DataLoader(renewing, batch_size=4, num_workers=2, collate_fn=list)
        assert [sample for batch in loader for sample in batch] == [*expected[1:], b"added"]


def until_given_back(buffers: tc.BufferPool) -> None:
    """Without a collection. A thread that has read into them may be about to let go of them still."""
    end = time.monotonic() + 60
    while buffers.lent_bytes:
        assert time.monotonic() < end, "buffers are held"
        time.sleep(0.01)


def test_samples_that_vanished_are_left_out_and_hold_no_buffers(s3: SeaweedFS, own_bucket: str) -> None:
    with tc.LocalPool() as pool:
        buffers = tc.BufferPool("1MiB")
        dataset = tc.CachedDataset.from_files(
            f"s3://{own_bucket}/data", output="numpy", buffers=buffers, on_error="skip", pool=pool
        )
        s3.client.delete_object(Bucket=own_bucket, Key=f"data/{dataset.keys()[1]}")
        gc.collect()
        gc.disable()
        try:
            for epoch in (1, 2):
                batch = dataset.__getitems__([0, 1, 2])
                assert [sample.tobytes() for sample in batch] == [payload(ORDER[0]), payload(ORDER[2])]
                assert dataset.skipped == epoch
                del batch
                until_given_back(buffers)
        finally:
            gc.enable()


@pytest.mark.parametrize(("method", "workers"), [("fork", 0), ("fork", 2), ("spawn", 1)])
@pytest.mark.forks
def test_bad_samples_are_counted_once_on_both_sides_of_a_stop(
    tmp_path: Path, method: str, workers: int
) -> None:
    """A short batch is a batch: the rest after a stop is what it would have been, and ranks stay even."""
    for number in range(FILES):
        (tmp_path / f"{number:02d}").write_bytes(b"bad" if number % 7 == 0 else b"%d" % number)
    settings: dict[str, Any] = {"multiprocessing_context": method} if workers else {}
    with tc.LocalPool() as pool:

        def make() -> tuple[tc.CachedDataset, StatefulDataLoader[Any]]:
            dataset = tc.CachedDataset.from_files(tmp_path, decode=number_of, on_error="skip", pool=pool)
            sampler = StatefulDistributedSampler(dataset, 1, 0, seed=3)
            return dataset, StatefulDataLoader(dataset, 4, sampler=sampler, num_workers=workers, **settings)

        dataset, loader = make()
        iterator = iter(loader)
        front = [next(iterator).tolist() for _ in range(5)]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        rest = [batch.tolist() for batch in iterator]
        assert len(front + rest) == FILES // 4
        assert sorted(n for batch in front + rest for n in batch) == [n for n in range(FILES) if n % 7]
        assert dataset.skipped == len(range(0, FILES, 7))
        second, resumed = make()
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == rest
        assert second.skipped == sum(4 - len(batch) for batch in rest)


def number_of(data: memoryview) -> int:
    return int(bytes(data))


def test_an_error_in_a_worker_reaches_the_user_with_its_type(s3: SeaweedFS, own_bucket: str) -> None:
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"s3://{own_bucket}/data", pool=pool)
        s3.client.delete_object(Bucket=own_bucket, Key=f"data/{dataset.keys()[0]}")
        with pytest.raises(tc.ObjectNotFound, match="is gone since this dataset was created"):
            list(DataLoader(dataset, batch_size=4, num_workers=1))


def test_nothing_there(bucket: str) -> None:
    with tc.LocalPool() as pool:
        with pytest.raises(
            tc.ObjectNotFound, match=rf"no objects under s3://{bucket}/dat/ \(looked for pattern="
        ):
            tc.CachedDataset.from_files(f"s3://{bucket}/dat", pool=pool)
        with pytest.raises(
            tc.ObjectNotFound, match=r"none of the 48 objects under .*/data/ match pattern='\*.png'"
        ):
            tc.CachedDataset.from_files(f"s3://{bucket}/data", pattern="*.png", pool=pool)
        with pytest.raises(tc.ObjectNotFound, match="no-such-bucket"):
            tc.CachedDataset.from_files("s3://no-such-bucket/data", pool=pool)
        with pytest.raises(tc.ConfigurationError, match="got '' as its URI"):
            tc.CachedDataset.from_files("", pool=pool)
        with pytest.raises(tc.ConfigurationError, match=r"gs://bucket/data.*s3://"):
            tc.CachedDataset.from_files("gs://bucket/data", pool=pool)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "credential"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuse"),
    ],
    ids=["missing", "wrong"],
)
def test_bad_credentials(bucket: str, variables: dict[str, str | None], message: str) -> None:
    with environment(variables), tc.LocalPool() as pool:
        with pytest.raises(tc.ConfigurationError) as caught:
            tc.CachedDataset.from_files(f"s3://{bucket}/data", pool=pool)
        assert message in str(caught.value).lower()
        assert "AWS_" in str(caught.value)  # what to set


def test_files_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for i in range(5):
        (folder / f"{i}").mkdir(parents=True)
        (folder / f"{i}" / "x.bin").write_bytes(payload(i))
    with tc.LocalPool() as pool:
        dataset = tc.CachedDataset.from_files(f"file://{folder}", pool=pool)
        for _ in range(2):
            assert dataset.__getitems__(range(5)) == [payload(i) for i in range(5)]
        assert reads(pool) == 5
