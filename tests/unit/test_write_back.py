"""Saves through the server's write-back: what a writer and a reader are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torchcache_server.cache.saves import SaveKey, manifest_digest
from write_back_world import (
    KEY,
    Bucket,
    Server,
    assert_settled,
    manifest_of,
    metadata_of,
    parts_of,
    soon,
)

from torchcache.errors import (
    AlreadyExists,
    CheckpointError,
    ConfigurationError,
    NotCommitted,
    ServerUnavailable,
    TorchCacheError,
)

SHARD = f"{KEY.path}/__0_0.distcp"


def unreachable(call: str, key: str) -> None:
    raise ServerUnavailable("no route to the under-store")


def reachable(call: str, key: str) -> None:
    pass


def refused(call: str, key: str) -> None:
    raise ConfigurationError("403: no such key id")


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.write_back.close()


# ---- the commit ----


def test_a_save_whose_bytes_arent_all_there_is_not_committed() -> None:
    """F2"""
    server = Server(Bucket(), "a")
    server.reserve("first")
    with pytest.raises(CheckpointError, match=r"of its file __0_0\.distcp chunk 0 of 1 isn't there"):
        server.commit("first")
    server.put("first")
    with pytest.raises(CheckpointError, match="was written with 1089 bytes in all, not 7"):
        server.commit("first", files=[("__0_0.distcp", 7)])
    with pytest.raises(NotCommitted, match="there is no committed checkpoint at s3://bucket/run/step-1"):
        server.state()
    server.commit("first")
    assert server.state() == "committed first"


@pytest.mark.parametrize("step", ["sync", "keep", "put_record"])
def test_a_disk_that_fails_commits_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F11, F13: what isn't on disk isn't acknowledged; the writer may try again."""
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")

    def fail(*arguments: object) -> None:
        raise TorchCacheError("the disk can't")

    with monkeypatch.context() as patch:
        patch.setattr(server.store, step, fail)
        with pytest.raises(TorchCacheError, match="the disk can't"):
            server.commit("first")
        with pytest.raises(NotCommitted):
            server.state()
    server.commit("first")
    server.upload()
    assert_settled(server.bucket, "first")


@pytest.mark.parametrize("step", ["sync", "keep", "put_record"])
def test_a_disk_that_fails_holds_no_copy(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Bucket(), "b")
    server.put("theirs")

    def fail(*arguments: object) -> None:
        raise TorchCacheError("the disk can't")

    with monkeypatch.context() as patch:
        patch.setattr(server.store, step, fail)
        with pytest.raises(TorchCacheError, match="the disk can't"):
            server.hold_copy("theirs", owner="a")
    assert server.write_back.counts()["copy"] == 0
    server.hold_copy("theirs", owner="a")
    assert server.write_back.counts()["copy"] == 1


def test_one_save_id_stands_for_one_manifest() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    with pytest.raises(AlreadyExists, match="another manifest"):
        server.write_back.commit(KEY, "first", [], metadata_of("first"), b"{}", deadline=soon())


def test_a_save_nobody_reserved_is_not_committed() -> None:
    server = Server(Bucket(), "a")
    server.put("first")
    for call in (lambda: server.write_back.renew(KEY, "first"), lambda: server.commit("first")):
        with pytest.raises(CheckpointError, match="isn't known to the server any more"):
            call()


def test_a_save_that_a_restart_cut_short_was_not_superseded_by_what_it_was_to_overwrite() -> None:
    """F2: nobody else wants the path; the writer is told to save again, not that another has won."""
    server = Server(Bucket(), "a")
    server.save("old")
    server.reserve("new", overwrite=True)
    server.put("new")
    server.restart()
    for call in (lambda: server.write_back.renew(KEY, "new"), lambda: server.commit("new")):
        with pytest.raises(CheckpointError, match="isn't known to the server any more") as caught:
            call()
        assert not isinstance(caught.value, AlreadyExists)


def test_a_path_that_is_saved_to_over_and_over_is_not_told_of_all_its_past() -> None:
    """I5: what a save may overwrite is in its record, and travels with each reservation."""
    server = Server(Bucket(), "a")
    for number in range(60):
        server.save(f"save {number}", overwrite=True)
        server.upload()
    server.reserve("next", overwrite=True)
    replaceable = server.write_back.replaceable(KEY)
    last = [manifest_digest(manifest_of(f"save {number}")) for number in (59, 58, 57)]
    assert list(replaceable[:3]) == last
    assert len(replaceable) <= 20


def test_what_is_not_uploaded_may_all_be_overwritten() -> None:
    """I2: the upload of each may have been stopped after its manifest was written."""
    server = Server(Bucket(), "a")
    for number in range(60):
        server.save(f"save {number}", overwrite=True)
    server.reserve("next", overwrite=True)
    assert {manifest_digest(manifest_of(f"save {n}")) for n in range(60)} <= {
        *server.write_back.replaceable(KEY)
    }


@pytest.mark.parametrize(
    "files",
    [
        [("../escape", 1)],
        [("/absolute", 1)],
        [("a/b", 1)],
        [("..", 1)],
        [("", 1)],
        [("a\0b", 1)],
        [("__0_0.distcp", -1)],
        [("twice", 1), ("twice", 1)],
        [(".metadata", 1)],
        [("__0.torchcache.json", 1)],
        [(".torchcache.save.json", 1)],
    ],
)
def test_bad_file_names_are_refused(files: list[tuple[str, int]]) -> None:
    server = Server(Bucket(), "a")
    server.reserve("first")
    with pytest.raises(ConfigurationError, match="s3/run/step-1"):
        server.commit("first", files=files)


@pytest.mark.parametrize(
    "key",
    [
        SaveKey("s3", ""),
        SaveKey("s3", "run/"),
        SaveKey("s3", "/run"),
        SaveKey("s3", "a/../b"),
        SaveKey("s3", "a\0b"),
        SaveKey("s3", "run", "rank"),
        SaveKey("elsewhere", "run"),
    ],
)
def test_bad_paths_are_refused(key: SaveKey) -> None:
    server = Server(Bucket(), "a")
    calls: list[Callable[[], object]] = [
        lambda: server.reserve("first", key),
        lambda: server.write_back.get(key, deadline=soon()),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError):
            call()
    assert not server.bucket.objects


def test_ranks_that_commit_each_for_itself_dont_meet() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    keys = [SaveKey("s3", "run/step-1", f"__{rank}") for rank in range(2)]
    for key in keys:
        server.reserve("shared id", key)
    server.put("shared id")
    server.write_back.abandon(keys[0], "shared id")
    assert server.commit("shared id", keys[1]) == "committed"
    server.upload(keys[1])
    assert_settled(bucket, "shared id", keys[1])
    assert keys[1].manifest_key == "run/step-1/__1.torchcache.json"


def test_a_commit_during_which_the_lease_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long fsync must not cost the lease."""
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")
    monkeypatch.setattr(server.store, "sync", lambda namespace: server.write_back.renew(KEY, "first"))
    server.commit("first")


# ---- readers ----


def test_readers_are_sent_to_the_newest_copy() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    a.upload()
    assert a.state() == b.state() == "durable first"
    status = b.write_back.get(KEY, deadline=soon())
    assert status.manifest == manifest_of("first")
    assert status.total_bytes == sum(len(data) for data in parts_of("first").values())
    assert status.committed_unix_s == 12.5
    b.save("second", overwrite=True)
    assert b.state() == "committed second"
    b.upload()
    assert a.state() == b.state() == "durable second"
    a.write_back.upload(KEY)
    assert a.namespaces == []  # what was overwritten is of no use any more
    del bucket.objects[KEY.manifest_key]
    with pytest.raises(NotCommitted):
        b.state()


def test_a_reader_is_served_while_the_under_store_is_away() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    server.upload()
    server.under_store.fail = unreachable
    assert server.state() == "durable first"


def test_an_evicted_save_is_read_from_the_under_store_and_its_record_goes() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    server.upload()
    server.write_back.tidy()
    assert [key[:5] for key in server.store.record] == [b"save/"]
    del server.store.chunks[KEY.namespace("first")]
    server.write_back.tidy()
    assert not server.store.record
    assert server.state() == "durable first"


def test_what_is_listed() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    steps = [SaveKey("s3", f"run/step-{i}") for i in range(4)]
    a.save("zero", steps[0])
    a.upload(steps[0])
    b.save("one", steps[1])
    b.upload(steps[1])
    a.save("two", steps[2])
    a.reserve("three", steps[3])
    bucket.objects["run/notes.txt"] = b"no checkpoint"
    bucket.objects["running/.torchcache.json"] = manifest_of("elsewhere")
    listed = [(s.key.path, s.save_id, s.state) for s in a.write_back.list("s3", "run/", deadline=soon())]
    assert listed == [
        ("run/step-0", "zero", "durable"),
        ("run/step-1", "one", "durable"),
        ("run/step-2", "two", "committed"),
        ("run/step-3", "three", "reserved"),
    ]
    assert a.write_back.list("s3", "elsewhere/", deadline=soon()) == []
    del bucket.objects[steps[0].manifest_key]
    bucket.objects[steps[1].manifest_key] = b""
    assert [s.save_id for s in a.write_back.list("s3", "run/", deadline=soon())] == ["two", "three"]
