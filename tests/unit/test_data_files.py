"""CachedDataset.from_files over a pool in memory: what it lists, reads, and refuses."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset, random_split

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset, progress, staged
from torchcache.data.listing import Changes
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectChanged,
    ObjectNotFound,
    OutOfSpace,
    ServerUnavailable,
)
from torchcache.model import ObjectId, ObjectInfo
from torchcache.pool import Residency

__all__ = ["pool"]

KEYS = ["a.png", "b/1.png", "b/10.png", "b/2.png", "c.txt", "ü.png", "Z.png"]


@pytest.fixture
def filled(pool: SamplePool) -> SamplePool:
    for key in KEYS:
        pool.put(f"s3://bucket/data/{key}", key.encode() * 3)
    pool.put("s3://bucket/data/b/", b"")  # a folder's marker
    pool.put("s3://bucket/database/x.png", b"of another folder")
    return pool


def from_files(pool: SamplePool, uri: str = "s3://bucket/data", **options: Any) -> CachedDataset:
    return CachedDataset.from_files(uri, pool=pool, **options)  # type: ignore[arg-type]


def test_samples_are_the_objects_by_key_bytewise(filled: SamplePool) -> None:
    dataset = from_files(filled)
    expected = sorted(KEYS, key=str.encode)
    assert dataset.keys() == expected
    assert len(dataset) == len(KEYS)
    assert [dataset[i] for i in range(len(dataset))] == [key.encode() * 3 for key in expected]
    assert all(type(sample) is bytes for sample in dataset.__getitems__([0, 1]))


@pytest.mark.parametrize("record_bytes", [None, 1])
def test_the_name_of_an_under_store_names_the_same_dataset(
    filled: SamplePool, record_bytes: int | None
) -> None:
    by_uri = from_files(filled, record_bytes=record_bytes)
    by_name = from_files(filled, "torchcache://s3/bucket/data/", record_bytes=record_bytes)
    assert by_name.keys() == by_uri.keys()
    assert by_name[0] == by_uri[0]
    assert filled.namespaces == {"s3://bucket/data"}  # by which commands pin, limit and evict it
    by_uri.stage(progress=False)
    assert by_name.residency() == by_uri.residency()
    by_name.stage(progress=False)
    assert filled.staged_under == {"s3://bucket/data"}


def test_an_under_store_without_a_folder_is_no_dataset(filled: SamplePool) -> None:
    with pytest.raises(ConfigurationError, match="names no bucket or folder"):
        from_files(filled, "torchcache://s3/")
    with pytest.raises(ConfigurationError, match="the pool has: file, s3"):
        from_files(filled, "torchcache://gs/bucket")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["Z.png", "a.png", "b/1.png", "b/10.png", "b/2.png", "ü.png"]),
        ("b/*", ["b/1.png", "b/10.png", "b/2.png"]),
        ("b/?.png", ["b/1.png", "b/2.png"]),
        ("[ac].*", ["a.png", "c.txt"]),
    ],
)
def test_the_pattern_is_matched_against_the_relative_key(
    filled: SamplePool, pattern: str, expected: list[str]
) -> None:
    assert from_files(filled, pattern=pattern).keys() == expected
    assert from_files(filled, "s3://bucket/data/", pattern=pattern).keys() == expected


def test_a_whole_bucket(filled: SamplePool) -> None:
    assert "database/x.png" in from_files(filled, "s3://bucket").keys()  # noqa: SIM118 - no mapping


def test_indices_are_those_of_a_list(filled: SamplePool) -> None:
    dataset = from_files(filled)
    samples = [dataset[i] for i in range(len(dataset))]
    for index in (-1, -len(dataset), np.int64(2), torch.tensor(3)):
        assert dataset[index] == samples[index]  # type: ignore[index]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range: the dataset has 7 samples"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset["a.png"]  # type: ignore[index]
    assert list(dataset) == samples


def test_a_batch_is_one_call_and_keeps_its_order(filled: SamplePool) -> None:
    dataset = from_files(filled)
    filled.reads.clear()
    batch = dataset.__getitems__([3, 0, 3, -1])
    assert batch == [dataset[3], dataset[0], dataset[3], dataset[6]]
    assert [len(call) for call in filled.reads] == [4, 1, 1, 1, 1]
    assert filled.namespaces == {"s3://bucket/data"}


def test_decode_gets_a_read_only_view_and_transform_comes_last(filled: SamplePool) -> None:
    seen: list[memoryview] = []

    def decode(data: memoryview) -> int:
        seen.append(data)
        return len(data)

    dataset = from_files(filled, decode=decode, transform=lambda size: size + 0.5)
    assert dataset[1] == 15.5
    assert isinstance(seen[0], memoryview)
    assert seen[0].readonly
    assert from_files(filled, transform=len)[1] == 15


def test_a_data_loader_takes_it(filled: SamplePool) -> None:
    dataset = from_files(filled, decode=lambda data: torch.tensor(len(data)))
    assert [batch.tolist() for batch in DataLoader(dataset, batch_size=4)] == [[15, 15, 21, 24], [21, 15, 18]]


def test_torchs_own_wrappers_go_around_it(filled: SamplePool) -> None:
    """A batch stays one request where the wrapper hands batches on."""
    dataset = from_files(filled, decode=len)
    sizes = [dataset[i] for i in range(len(dataset))]
    first, second = random_split(dataset, [4, 3], generator=torch.Generator().manual_seed(1))
    filled.reads.clear()
    assert sorted(flat(first, 4) + flat(second, 4)) == sorted(sizes)
    assert len(filled.reads) == 2
    filled.reads.clear()
    assert flat(Subset(dataset, [6, 0, 3]), 3) == [sizes[6], sizes[0], sizes[3]]
    assert flat(StackDataset(dataset, range(7)), 7) == [*zip(sizes, range(7), strict=True)]
    assert len(filled.reads) == 2
    assert flat(ConcatDataset([dataset, dataset]), 5) == sizes * 2


def flat(dataset: Any, batch_size: int) -> list[Any]:
    return [sample for batch in DataLoader(dataset, batch_size, collate_fn=list) for sample in batch]


def test_it_pickles_small(filled: SamplePool) -> None:
    for i in range(2000):
        filled.put(f"s3://bucket/many/{i}", b"x")
    dataset = from_files(filled, "s3://bucket/many")
    keys = dataset.keys()
    filled.objects.clear()  # of the pool in memory, which pickles whole
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).keys() == keys


def test_repr_says_what_it_is(filled: SamplePool) -> None:
    text = repr(from_files(filled, pattern="b/*"))
    assert text == "CachedDataset.from_files('s3://bucket/data', pattern='b/*': 3 objects, 66 bytes)"


@pytest.mark.parametrize("path", ["/data/images", "/data//images/", "//data/images", Path("/data/images")])
def test_an_absolute_path_is_a_file_uri(pool: SamplePool, path: Any) -> None:
    pool.put("file:///data/images/a.png", b"a")
    dataset = from_files(pool, path)
    assert dataset.keys() == ["a.png"]
    assert dataset.state_dict() == from_files(pool, "file:///data/images").state_dict()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "got '' as its URI"),
        ("  ", "got '  ' as its URI"),
        (None, "got None as its URI"),
        ("bucket/data", "'bucket/data', which is no URI"),
        (Path("s3://bucket/data"), "pass it as a str: 's3://...'"),
        (Path("data/images"), "which is no URI"),
        ("/", "names no bucket or folder"),
        ("://x", "is no URI"),
        ("s3://", "names no bucket or folder"),
        ("s3:///", "names no bucket or folder"),
        ("gs://bucket/x", "no under-store for gs://bucket/x"),
    ],
)
def test_bad_uris_are_refused(filled: SamplePool, uri: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_files(filled, uri)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "pattern", "message"),
    [
        ("s3://bucket/dat", "*", "there are no objects under s3://bucket/dat/ (looked for pattern='*')"),
        ("s3://bucket/data", "*.jpg", "none of the 7 objects under s3://bucket/data/ match pattern='*.jpg'"),
        ("s3://buckett/data", "*", "there is no bucket buckett"),
    ],
)
def test_nothing_found_says_what_was_looked_for(
    filled: SamplePool, uri: str, pattern: str, message: str
) -> None:
    with pytest.raises(ObjectNotFound) as caught:
        from_files(filled, uri, pattern=pattern)
    assert message in str(caught.value)


def test_a_listing_in_another_order_is_sorted(filled: SamplePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SeaweedFS lists folder by folder. An index must mean the same sample on every rank."""
    listed = [ObjectInfo(ObjectId("s3", f"bucket/data/{k}", "v"), 1) for k in ("a/x", "a/y", "a-b")]
    monkeypatch.setattr(filled, "list", lambda uri: iter(listed))
    assert from_files(filled).keys() == ["a-b", "a/x", "a/y"]


def test_a_listing_whose_order_is_wrong_only_in_what_is_left_out(
    filled: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list as it came and the sorted one are then equal, and are one file."""
    listed = [ObjectInfo(ObjectId("s3", f"bucket/data/{k}", "v"), 1) for k in ("a.png", "z.txt", "b.png")]
    monkeypatch.setattr(filled, "list", lambda uri: iter(listed))
    dataset = from_files(filled, pattern="*.png")
    assert dataset.keys() == ["a.png", "b.png"]
    assert [p.suffix for p in dataset._samples._manifest.path.parent.iterdir()] == [".arrow"]  # type: ignore[attr-defined]


def test_a_listing_that_names_an_object_twice_is_refused(
    filled: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [ObjectInfo(ObjectId("s3", "bucket/data/a", version), 1) for version in ("v", "w")]
    monkeypatch.setattr(filled, "list", lambda uri: iter(listed))
    with pytest.raises(IntegrityError, match="a listing has 'bucket/data/a' twice"):
        from_files(filled)


def test_an_object_that_went_or_changed_says_so(filled: SamplePool) -> None:
    dataset = from_files(filled)
    filled.delete("s3://bucket/data/a.png")
    filled.put("s3://bucket/data/c.txt", b"other")
    with pytest.raises(
        ObjectNotFound, match=r"s3://bucket/data/a\.png is gone since.*create it again"
    ) as gone:
        dataset.__getitems__([0, 1])
    assert gone.value.object == "s3://bucket/data/a.png"
    with pytest.raises(ObjectChanged, match=r"s3://bucket/data/c\.txt has changed since.*create it again"):
        dataset[5]


def test_refresh_finds_what_was_added_removed_and_changed(filled: SamplePool) -> None:
    dataset = from_files(filled)
    state, before = dataset.state_dict(), dataset.keys()
    assert not dataset.refresh()
    dataset.load_state_dict(state)
    filled.delete("s3://bucket/data/a.png")
    filled.put("s3://bucket/data/c.txt", b"other")
    filled.put("s3://bucket/data/0.png", b"first")
    filled.put("s3://bucket/data/zz/z.png", b"last")
    found = dataset.refresh()
    assert found == Changes(added=("0.png", "zz/z.png"), removed=("a.png",), changed=("c.txt",))
    assert dataset.keys() == sorted({*before, "0.png", "zz/z.png"} - {"a.png"})
    assert dataset[0] == b"first" and dataset[len(dataset) - 2] == b"last"  # and then ü
    with pytest.raises(ConfigurationError, match="saved over other samples"):
        dataset.load_state_dict(state)
    for key in dataset.keys():  # noqa: SIM118 - no mapping
        filled.delete(f"s3://bucket/data/{key}")
    with pytest.raises(ObjectNotFound, match="no objects under"):
        dataset.refresh()
    assert len(dataset) == 8  # nothing has changed then


def test_computed_samples_are_not_listed(pool: SamplePool) -> None:
    with pytest.raises(ConfigurationError, match="only the files of from_files"):
        CachedDataset([1, 2], name="x", pool=pool).refresh()  # type: ignore[arg-type]


@pytest.mark.parametrize("output", ["bytes", "numpy"])
def test_what_changed_is_read_as_it_is_now_if_asked_for(filled: SamplePool, output: str) -> None:
    dataset = from_files(filled, on_change="refresh", output=output)
    here = [bytes(sample) for sample in dataset.__getitems__(range(7))]
    changed = {1: b"shorter", 5: b"another that is longer than what was there " * 9}
    for index, data in changed.items():
        filled.put(f"s3://bucket/data/{dataset.keys()[index]}", data)
    expected = [changed.get(index, sample) for index, sample in enumerate(here)]
    assert [bytes(sample) for sample in dataset.__getitems__(range(7))] == expected
    again = pickle.loads(pickle.dumps(dataset._samples._renewed))  # type: ignore[attr-defined]
    assert sorted(again) == [1, 5]
    filled.delete(f"s3://bucket/data/{dataset.keys()[1]}")
    with pytest.raises(ObjectNotFound, match="is gone since"):
        dataset.__getitems__([1])


def test_changed_records_are_an_error_all_the_same(filled: SamplePool) -> None:
    filled.put("s3://records/a", b"abcd")
    dataset = from_files(filled, "s3://records", record_bytes=2, on_change="refresh")
    filled.put("s3://records/a", b"efgh")
    with pytest.raises(ObjectChanged, match="has changed since"):
        dataset[0]
    assert dataset.refresh() == Changes(changed=("a",))
    assert dataset[1] == b"gh"
    with pytest.raises(ConfigurationError, match="on_change='ignore'"):
        from_files(filled, on_change="ignore")


def test_a_long_listing_says_how_far_it_is(
    filled: SamplePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    listed = [ObjectInfo(ObjectId("s3", f"bucket/data/{n:05d}", "v"), 1) for n in range(2500)]
    monkeypatch.setattr(filled, "list", lambda uri: iter(listed))
    caplog.set_level("INFO", "torchcache")
    from_files(filled)
    assert "listing s3://bucket/data: 1000 objects so far" in caplog.text


def test_other_errors_come_as_they_are(filled: SamplePool) -> None:
    dataset = from_files(filled)
    filled.errors["s3://bucket/data/a.png"] = ServerUnavailable("S3 is away", object="s3://bucket/data/a.png")
    with pytest.raises(ServerUnavailable, match="S3 is away"):
        dataset[1]


def test_stage_and_residency(
    filled: SamplePool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = from_files(filled)
    assert dataset.residency().fraction == 0.0
    report = dataset.stage(progress=False)
    assert (report.complete, report.missing, str(report)) == (True, (), "all 7 are in the pool")
    assert capfd.readouterr() == ("", "")
    assert dataset.residency().fraction == 1.0
    dataset.stage()
    assert capfd.readouterr() == ("", ""), "no terminal, no bar"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    dataset.stage()
    out, err = capfd.readouterr()
    assert out == ""
    assert "7/7 samples, 129 bytes of 129 bytes" in err


def test_staging_raises_what_it_met(filled: SamplePool) -> None:
    dataset = from_files(filled)
    filled.errors["s3://bucket/data/a.png"] = ObjectNotFound("gone", object="s3://bucket/data/a.png")
    with pytest.raises(ObjectNotFound, match="gone"):
        dataset.stage(progress=False)
    assert dataset.residency().resident_objects == 6  # the others are there


def test_a_stage_lists_what_is_missing_and_why(filled: SamplePool, caplog: pytest.LogCaptureFixture) -> None:
    dataset = from_files(filled)
    uri = "s3://bucket/data/a.png"
    filled.errors[uri] = ObjectNotFound("gone", object=uri, server="node1:7440")
    report = dataset.stage(progress=False, on_missing="report")
    assert not report.complete
    assert [(one.uri, one.server, type(one.error)) for one in report.missing] == [
        (uri, "node1:7440", ObjectNotFound)
    ]
    assert str(report) == "6 of 7 are in the pool. Missing are 1 at node1:7440: gone"
    with pytest.raises(ObjectNotFound):
        dataset.stage(progress=False)
    assert str(report) in caplog.text


def test_what_had_to_go_while_the_rest_was_staged_is_missing_too(
    filled: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = from_files(filled)
    stage = filled.stage

    def stage_and_lose_one(objects: Sequence[ObjectInfo], **options: Any) -> None:
        stage(objects, **options)
        filled.resident.discard(objects[3].id)

    monkeypatch.setattr(filled, "stage", stage_and_lose_one)
    report = dataset.stage(progress=False, on_missing="report")
    assert (report.complete, report.missing_count, report.missing[0].server) == (False, 1, "127.0.0.1:7440")
    with pytest.raises(OutOfSpace, match="had to go again"):
        dataset.stage(progress=False)


def test_what_failed_and_what_had_to_go_again_are_both_missing(
    filled: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = from_files(filled)
    uri = "s3://bucket/data/a.png"
    filled.errors[uri] = ObjectNotFound("gone", object=uri, server="node1:7440")
    stage = filled.stage
    lost: list[str] = []

    def stage_and_lose_two(objects: Sequence[ObjectInfo], **options: Any) -> None:
        stage(objects, **options)
        held = [info.id for info in objects if info.id in filled.resident]
        lost.extend(filled.uri(id_) for id_ in held[:2])
        filled.resident.difference_update(held[:2])

    monkeypatch.setattr(filled, "stage", stage_and_lose_two)
    report = dataset.stage(progress=False, on_missing="report")
    assert [(one.uri, type(one.error)) for one in report.missing] == [
        (uri, ObjectNotFound),
        *((one, OutOfSpace) for one in lost),
    ]
    assert (report.missing_count, report.residency.resident_objects) == (3, 4)
    monkeypatch.setattr(staged, "MAX_LISTED", 1)
    report = dataset.stage(progress=False, on_missing="report")
    assert ([one.uri for one in report.missing], report.missing_count) == ([uri], 3)
    with pytest.raises(ObjectNotFound, match="gone"):
        dataset.stage(progress=False)


@pytest.mark.parametrize("listed", [0, 1, 2, 3, 4, 5, 6, 10_000])
def test_each_missing_object_counts_once_however_many_are_listed(
    filled: SamplePool, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "MAX_LISTED", listed)
    for key in ["0.png", "empty.png"]:
        filled.put(f"s3://bucket/data/{key}", b"")
    dataset = from_files(filled)
    failing = [f"s3://bucket/data/{key}" for key in ("0.png", "empty.png", "a.png", "b/2.png")]
    stage = filled.stage

    def stage_and_lose_one(objects: Sequence[ObjectInfo], **options: Any) -> None:
        stage(objects, **options)
        for info in objects:
            if filled.uri(info.id) == failing[2]:
                for _ in range(3):  # as of a large one, whose chunks fail at several servers
                    options["on_missing"](info, filled.errors[failing[2]])
        filled.resident.discard(filled.stat("s3://bucket/data/c.txt").id)

    filled.errors.update({uri: ObjectNotFound("gone", object=uri) for uri in failing})
    monkeypatch.setattr(filled, "stage", stage_and_lose_one)
    report = dataset.stage(progress=False, on_missing="report")
    assert report.missing_count == 5
    uris = [one.uri for one in report.missing]
    assert len(uris) == min(listed, 5)
    assert set(uris) <= {*failing, "s3://bucket/data/c.txt"}
    assert not report.complete


def test_any_number_of_missing_objects_takes_memory_for_those_that_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staged, "MAX_LISTED", 10)
    missing = staged.MissingList(lambda info: f"s3://bucket/data/{info.id.key}")
    count = 20_000
    tracemalloc.start()
    for take in (missing.add_failed, missing.add_absent):
        for number in range(count):
            info = ObjectInfo(ObjectId("s3", f"{number:08d}", "v"), 1)
            take(info, ObjectNotFound("gone", object=info.id.key))
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    nothing = Residency(objects=count, resident_objects=0, bytes=count, resident_bytes=0)
    report = missing.report(nothing)
    assert (len(report.missing), report.missing_count) == (10, count)
    assert held_bytes < 10 * count


def test_a_position_over_other_files_is_refused(filled: SamplePool) -> None:
    state = from_files(filled).state_dict()
    from_files(filled).load_state_dict(state)
    filled.put("s3://bucket/data/new.png", b"x")
    with pytest.raises(ConfigurationError, match="count was 7, is 8"):
        from_files(filled).load_state_dict(state)
    filled.delete("s3://bucket/data/new.png")
    filled.put("s3://bucket/data/a.png", b"other bytes")
    with pytest.raises(ConfigurationError, match="digest was"):
        from_files(filled).load_state_dict(state)
