"""Folders seen in flat listings, against the plain definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchcache.filesystem.entries import entries_under, file_entry
from torchcache.model import ObjectId, ObjectInfo

segments = st.text("ab.é", min_size=1, max_size=3)
paths = st.lists(segments, min_size=1, max_size=4).map("/".join)


def files_of(folder: str, keys: set[str]) -> list[dict[str, object]]:
    return [
        file_entry(f"{folder}/{key}", ObjectInfo(ObjectId("s3", key, "1"), len(key))) for key in sorted(keys)
    ]


@given(st.sets(paths, max_size=12), paths, st.none() | st.integers(1, 5))
def test_files_and_folders_are_those_that_keys_imply(
    keys: set[str], folder: str, maxdepth: int | None
) -> None:
    files, folders = entries_under(folder, files_of(folder, keys), maxdepth=maxdepth)
    depth = 99 if maxdepth is None else maxdepth
    assert set(files) == {f"{folder}/{key}" for key in keys if key.count("/") < depth}
    parents = {"/".join(key.split("/")[:n]) for key in keys for n in range(1, key.count("/") + 1)}
    assert set(folders) == {f"{folder}/{parent}" for parent in parents if parent.count("/") < depth}
    assert all(entry["type"] == "file" and entry["name"] == name for name, entry in files.items())
    assert all(entry["type"] == "directory" and entry["name"] == name for name, entry in folders.items())


@given(st.sets(paths, min_size=1, max_size=8))
def test_a_marker_is_its_folder(keys: set[str]) -> None:
    files, folders = entries_under("s3/b", files_of("s3/b", {f"{key}/" for key in keys}))
    assert not files
    assert {f"s3/b/{key}" for key in keys} <= set(folders)
