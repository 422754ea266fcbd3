"""In a POSIX under-store nothing has its name before it is durable, nor is it acknowledged before its name is (F3, I2).

`durability="store"` rests on that. What the kernel is asked to do, and in which order, is all that can be seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.understore.posix import PosixUnderStore
from torchcache_server.understore.posix_files import TEMPORARY_PREFIX

from torchcache.save_names import CLAIM_NAME

FILE = ["write file", "touch file", "fsync file"]
"""The steps by which a temporary file gets its content."""


class Steps(list[str]):
    """What is done beneath `root`, by call and path; a temporary file's is "file", its end is left out."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def note(self, call: str, folder: int, name: str = "") -> None:
        path = Path(f"/proc/self/fd/{folder}").readlink() / name
        if path.is_relative_to(self._root):
            told = path.relative_to(self._root).as_posix()
            if TEMPORARY_PREFIX not in told:
                self.append(f"{call} {told}")
            elif call != "unlink":
                self.append(f"{call} file")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps(tmp_path / "root")

    def watch(call: str, note: Callable[..., None], told: str = "") -> None:
        real: Callable[..., Any] = getattr(os, call)

        def watched(*args: Any, **kwargs: Any) -> Any:
            note(told or call, *args, **kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, watched)

    def of_file(call: str, fd: int, *_: Any, **__: Any) -> None:
        steps.note(call, fd)

    def of_name(call: str, name: str, *_: Any, dir_fd: int) -> None:
        steps.note(call, dir_fd, name)

    def of_new_name(call: str, _: str, name: str, *, dst_dir_fd: int, **__: Any) -> None:
        steps.note(call, dst_dir_fd, name)

    watch("write", of_file)
    watch("utime", of_file, "touch")
    watch("fsync", of_file)
    for call in ("mkdir", "rmdir", "unlink"):
        watch(call, of_name)
    for call in ("link", "rename"):
        watch(call, of_new_name, "name")
    return steps


@pytest.fixture
def files(tmp_path: Path) -> PosixUnderStore:
    (tmp_path / "root" / "a").mkdir(parents=True)
    return PosixUnderStore("files", f"file://{tmp_path / 'root'}")


def put(files: PosixUnderStore, key: str, *, replaces: str | None = None) -> str:
    data = iter([memoryview(b"data")])
    return files.write(key, data, 4, replaces=replaces, deadline=time.monotonic() + 60).id.version


@pytest.mark.parametrize("replaces", [None, ""])
def test_a_file_is_durable_before_it_has_its_name_and_then_its_name_is(
    files: PosixUnderStore, steps: Steps, replaces: str | None
) -> None:
    put(files, "a/x", replaces=replaces)
    assert steps == [*FILE, "name a/x", "fsync a"]


def test_one_that_replaces_another_is_too(files: PosixUnderStore, steps: Steps) -> None:
    version = put(files, "a/x", replaces="")
    steps.clear()
    put(files, "a/x", replaces=version)
    assert steps == [*FILE, "name a/x", "fsync a"]


def test_a_time_that_is_set_to_make_the_version_another_is_durable(
    files: PosixUnderStore, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(files, "a/x")
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # the clock was set back
    steps.clear()
    put(files, "a/x")
    assert steps == [*FILE, "touch file", "fsync file", "name a/x", "fsync a"]


def test_the_names_of_new_folders_are_durable(files: PosixUnderStore, steps: Steps) -> None:
    put(files, "b/c/x")
    assert steps == ["mkdir b", "fsync .", "mkdir b/c", "fsync b", *FILE, "name b/c/x", "fsync b/c"]


def test_a_deletion_is_durable(files: PosixUnderStore, steps: Steps) -> None:
    put(files, "a/x")
    steps.clear()
    files.delete("a/x", deadline=time.monotonic() + 60)
    assert steps == ["unlink a/x", "fsync a"]


def test_so_is_that_of_a_checkpoints_folder(files: PosixUnderStore, steps: Steps) -> None:
    put(files, f"a/{CLAIM_NAME}")
    steps.clear()
    files.delete(f"a/{CLAIM_NAME}", deadline=time.monotonic() + 60)
    assert steps == [f"unlink a/{CLAIM_NAME}", "fsync a", "rmdir a", "fsync ."]
