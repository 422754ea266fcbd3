"""The store's folder: whose it is, who uses it, and what lies in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torchcache_server.store import Store

from tests.unit.store_parts import CAPACITY, chunk, fill
from torchcache.errors import ConfigurationError


def open_store(path: Path) -> Store:
    return Store(path, capacity_bytes=CAPACITY)


def test_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    store = open_store(path)
    fill(store, "n", range(3))
    store.put_record(b"k", b"v")
    store.close()
    assert (path.stat().st_mode & 0o777) == 0o700
    for found in path.rglob("*"):
        assert found.stat().st_mode & 0o077 == 0, found


def test_in_use(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ConfigurationError, match=f"{tmp_path} is in use by another server"):
        open_store(tmp_path)
    fill(store, "n", range(1))
    store.close()
    open_store(tmp_path).close()


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="can't be opened"):
        open_store(tmp_path / "file" / "below")


def test_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the id that the process sees is another: chown would need root."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="belongs to user"):
        open_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_open_to_everyone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="everyone may write"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["store.lock", "store.json", "clean"])
def test_symlinks_are_not_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    path = tmp_path / "store"
    path.mkdir()
    (path / name).symlink_to(outside)
    try:
        open_store(path).close()
    except ConfigurationError as error:
        assert str(path) in str(error)
    assert outside.read_text() == "untouched"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"format": "torchcache store 0", "server_id": "x"}),
        json.dumps({"format": "torchcache store 1"}),
        "not json",
        "[]",
        "",
    ],
)
def test_another_format_is_emptied(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    """F40. What isn't the store's own stays."""
    store = open_store(tmp_path)
    identity = store.server_id
    fill(store, "n", range(3))
    store.keep("n", True)
    store.keep("n", False)
    store.put_record(b"k", b"v")
    store.close()
    (tmp_path / "store.json").write_text(content)
    (tmp_path / "server.log").write_text("mine")
    store = open_store(tmp_path)
    assert "is emptied" in caplog.text
    assert store.server_id != identity
    assert store.usage().segments == 0
    assert store.namespaces() == []
    assert list(store.records(b"")) == []
    assert store.lookup(chunk(1)) is None
    assert (tmp_path / "server.log").read_text() == "mine"
    store.close()


@pytest.mark.parametrize("content", ["{", '{"format": "0", "server_id": "x"}', None])
def test_another_format_is_refused_while_it_holds_what_must_be_kept(
    tmp_path: Path, content: str | None
) -> None:
    """F40, I2: a store that may hold an acknowledged checkpoint is never emptied."""
    store = open_store(tmp_path)
    fill(store, "n", range(3))
    store.keep("n", True)
    store.close()
    identity = (tmp_path / "store.json").read_text()
    if content is None:
        (tmp_path / "store.json").unlink()
    else:
        (tmp_path / "store.json").write_text(content)
    with pytest.raises(ConfigurationError, match="not have been uploaded"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text(identity)
    store = open_store(tmp_path)
    assert store.lookup(chunk(1)) is not None
    store.close()


def test_a_folder_with_other_files_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("mine")
    open_store(tmp_path).close()
    assert (tmp_path / "server.log").read_text() == "mine"


def test_a_smaller_capacity_evicts_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for namespace in range(6):
        fill(store, f"n{namespace}", range(namespace * 8, namespace * 8 + 8), size=1 << 20)
    store.keep("n0", True)
    store.close()
    store = Store(tmp_path, capacity_bytes=CAPACITY // 4)
    assert store.usage().used_bytes <= CAPACITY // 4
    assert store.usage().evicted_chunks > 0
    assert all(store.contains(chunk(n)) for n in range(8)), "n0 is kept"
    store.close()
