"""The frozen list of a dataset's objects: mapped, pickled by name, and never another list than it says."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchcache.data import manifest as module
from torchcache.data.manifest import Manifest
from torchcache.errors import ConfigurationError, IntegrityError, ObjectNotFound
from torchcache.model import ObjectId, ObjectInfo

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_ROWS = st.lists(st.tuples(_TEXT, _TEXT, st.integers(0, 2**62)), max_size=20)


def objects(rows: list[tuple[str, str, int]]) -> list[ObjectInfo]:
    return [ObjectInfo(ObjectId("s3", key, version), size) for key, version, size in rows]


def some(count: int) -> list[ObjectInfo]:
    return objects([(f"bucket/{i:06d}.bin", f"v{i}", i) for i in range(count)])


@given(_ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read(tmp_path: Path, rows: list[tuple[str, str, int]]) -> None:
    listed = objects(rows)
    manifest = Manifest.write("s3", iter(listed), tmp_path)
    assert len(manifest) == len(listed)
    assert [manifest[i] for i in range(len(listed))] == listed
    assert manifest.keys() == [o.id.key for o in listed]
    assert manifest.total_bytes == sum(o.size for o in listed) or sum(o.size for o in listed) >= 2**63


@given(_ROWS, _ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_equal_lists_and_only_they_have_equal_digests(
    tmp_path: Path, one: list[tuple[str, str, int]], other: list[tuple[str, str, int]]
) -> None:
    digests = [Manifest.write("s3", objects(rows), tmp_path).digest for rows in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)
    assert Manifest.write("file", objects(one), tmp_path).digest != digests[0]


def test_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    for count in (0, 1, 6, 7, 8, 14, 20):
        manifest = Manifest.write("s3", some(count), tmp_path)
        assert len(manifest) == count
        assert [manifest[i] for i in range(count)] == some(count)


def test_it_pickles_as_a_name(tmp_path: Path) -> None:
    manifest = Manifest.write("s3", some(1000), tmp_path)
    pickled = pickle.dumps(manifest)
    assert len(pickled) < 300
    assert pickle.loads(pickled)[999] == some(1000)[999]


def test_equal_lists_share_a_file_that_only_the_user_reads(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    one, other = (Manifest.write("s3", some(5), folder) for _ in range(2))
    assert [p.name for p in folder.iterdir()] == [f"{one.checksum}.arrow"]
    assert one.path == other.path
    assert folder.stat().st_mode & 0o77 == 0
    assert one.path.stat().st_mode & 0o77 == 0


def test_a_list_that_is_gone_says_so(tmp_path: Path) -> None:
    manifest = Manifest.write("s3", some(5), tmp_path)
    manifest.path.unlink()
    with pytest.raises(ObjectNotFound, match="create the dataset again, on this machine"):
        len(manifest)


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    manifest = Manifest.write("s3", some(50), tmp_path)
    good = manifest.path.read_bytes()
    damages = [good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :] for at in range(0, len(good), 7)]
    for damaged in (*damages, good[:-10], good + b"x", b"x"):
        manifest.path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="is damaged: create the dataset again"):
            len(pickle.loads(pickle.dumps(manifest)))
    manifest.path.write_bytes(b"")
    with pytest.raises(IntegrityError):
        len(manifest)


def test_another_list_under_its_name_is_refused(tmp_path: Path) -> None:
    one, other = Manifest.write("s3", some(5), tmp_path), Manifest.write("s3", some(6), tmp_path)
    other.path.replace(one.path)
    with pytest.raises(IntegrityError, match="damaged"):
        one[0]


def test_a_failed_listing_leaves_nothing_behind(tmp_path: Path) -> None:
    def listing() -> object:
        yield from some(3)
        raise ObjectNotFound("the bucket went")

    with pytest.raises(ObjectNotFound, match="the bucket went"):
        Manifest.write("s3", listing(), tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_lists_unused_for_a_month_are_swept(tmp_path: Path) -> None:
    old, used = Manifest.write("s3", some(1), tmp_path), Manifest.write("s3", some(2), tmp_path)
    long_ago = time.time() - 31 * 24 * 3600
    for path in (old.path, used.path):
        os.utime(path, (long_ago, long_ago))
    assert len(used) == 2  # opening it counts as use
    Manifest.write("s3", some(3), tmp_path)
    assert not old.path.exists()
    assert used.path.exists()


def test_a_folder_that_can_not_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="TORCHCACHE_HOME"):
        Manifest.write("s3", some(1), tmp_path / "file" / "manifests")
