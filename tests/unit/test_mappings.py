"""Pages of mapped files: those that are there are left alone, and those that can't be had are an error, no SIGBUS."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from torchcache import mappings
from torchcache.mappings import Mapping, populate

PAGE = 16 * mmap.PAGESIZE  # from so much on it is asked what is in memory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (4 * PAGE))
    return path


def mapped(path: Path) -> Mapping:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Mapping(fd, path.stat().st_size)
    finally:
        os.close(fd)


def test_pages_in_memory_are_populated_from_any_byte_to_any_byte(file: Path) -> None:
    mapping = mapped(file)
    for at, size in ((0, 4 * PAGE), (0, 1), (PAGE - 1, 2), (3 * PAGE + 5, PAGE - 5)):
        populate(mapping.address + at, size)


def test_a_page_that_the_file_has_lost_is_an_error(file: Path) -> None:
    mapping = mapped(file)
    populate(mapping.address, 4 * PAGE)
    os.truncate(file, 2 * PAGE)
    populate(mapping.address, 2 * PAGE)
    for at, size in ((2 * PAGE, 1), (PAGE, 2 * PAGE), (0, 4 * PAGE)):
        with pytest.raises(OSError) as caught:
            populate(mapping.address + at, size)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("owner", [0, 1])
def test_of_others_files_the_kernels_word_is_not_asked(
    file: Path, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says of all their pages that they are in memory, so that a fault would end the process."""
    asked: list[int] = []
    real = mappings._madvise

    def counted(address: int, size: int, advice: int) -> int:
        asked.append(size)
        return int(real(address, size, advice))

    monkeypatch.setattr(mappings, "_madvise", counted)
    monkeypatch.setattr(mappings, "_are_in_memory", lambda *_: True)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + owner)
    mapping = mapped(file)
    assert mapping.is_own == (owner == 0)
    populate(mapping.address, 4 * PAGE, may_ask=mapping.is_own)
    assert asked == ([4 * PAGE] if owner else [mmap.PAGESIZE])


def test_a_hole_among_pages_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.write(b"x" * PAGE)
        file.seek(3 * PAGE)
        file.write(b"x" * PAGE)
    mapping = mapped(path)
    populate(mapping.address, 4 * PAGE)
