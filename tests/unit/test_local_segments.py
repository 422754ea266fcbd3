"""Mapped segments: the right file or none, and a lock that lasts as long as anybody looks at it."""

from __future__ import annotations

import fcntl
import weakref
from pathlib import Path

import pytest

from tests.unit.store_parts import descriptors
from torchcache.lanes import local_segments
from torchcache.lanes.local_segments import MappedSegments, locks_stay_with_mappings, map_segment, most_mapped
from torchcache.records import SegmentHeader, file_at, file_entry

SIZE = 64 * 1024
NONCE = 0x1234


def segment(store: Path, number: int, *, nonce: int = NONCE, namespace: str = "n", size: int = SIZE) -> Path:
    """A segment's file, filled with its number."""
    _, name = file_at(number, file_entry(nonce, namespace))
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = SegmentHeader(number, nonce, SIZE, namespace).encode()
    path.write_bytes((header + bytes([number]) * SIZE)[:size])
    return path


def is_locked(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def mappings(store: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(store) in line]


@pytest.fixture(params=[True, False], ids=["with a descriptor", "without"])
def segments(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> MappedSegments:
    monkeypatch.setattr(
        local_segments, "_alive", weakref.WeakSet()
    )  # what other tests left mapped counts too
    found = MappedSegments(str(tmp_path))
    assert locks_stay_with_mappings(str(tmp_path)), "the file system of the tests is no overlay"
    found._locks_stay = not request.param
    return found


def test_a_view_keeps_the_lock_when_all_else_has_gone(tmp_path: Path, segments: MappedSegments) -> None:
    path = segment(tmp_path, 7)
    found = segments.get(7, file_entry(NONCE, "n"))
    assert found is not None
    assert (found.number, found.nonce, found.namespace, len(found.view)) == (7, NONCE, "n", SIZE)
    view = found.view[1000:1010]
    assert view.readonly
    assert bytes(view) == b"\x07" * 10
    del found
    assert is_locked(path)
    segments.clear()
    assert is_locked(path)
    assert bytes(view) == b"\x07" * 10
    view.release()
    del view
    assert not is_locked(path)
    assert not mappings(tmp_path)


def test_no_descriptor_is_left_open(tmp_path: Path, segments: MappedSegments) -> None:
    before = descriptors(tmp_path)
    for number in range(5):
        segment(tmp_path, number)
        assert segments.get(number, file_entry(NONCE, "n")) is not None
    assert descriptors(tmp_path) == before + (0 if segments._locks_stay else 5)
    segments.clear()
    assert descriptors(tmp_path) == before


def test_another_segment_in_the_file_is_not_taken_for_it(tmp_path: Path, segments: MappedSegments) -> None:
    """The file was used again, under the name it had or another one's."""
    path = segment(tmp_path, 3)
    path.write_bytes(SegmentHeader(4, NONCE + 1, SIZE, "n").encode() + bytes(SIZE))
    assert segments.get(3, file_entry(NONCE, "n")) is None
    path.write_bytes(SegmentHeader(3, NONCE + 1, SIZE, "n").encode() + bytes(SIZE))
    assert segments.get(3, file_entry(NONCE, "n")) is None
    assert not is_locked(path)


@pytest.mark.parametrize("size", [0, 10, 100, SIZE - 1])
def test_a_file_that_is_too_short_is_none(tmp_path: Path, segments: MappedSegments, size: int) -> None:
    segment(tmp_path, 3, size=size)
    assert segments.get(3, file_entry(NONCE, "n")) is None


def test_a_file_that_becomes_another_just_now_is_none(tmp_path: Path, segments: MappedSegments) -> None:
    path = segment(tmp_path, 3)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert segments.get(3, file_entry(NONCE, "n")) is None
    assert segments.get(3, file_entry(NONCE, "n")) is not None


def test_what_isnt_there_is_none(tmp_path: Path, segments: MappedSegments) -> None:
    assert segments.get(1, None) is None
    assert segments.get(1, file_entry(NONCE, "n")) is None
    path = segment(tmp_path, 1)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert segments.get(1, file_entry(NONCE, "n")) is None


def test_a_number_that_was_given_again_is_mapped_anew(tmp_path: Path, segments: MappedSegments) -> None:
    segment(tmp_path, 1)
    before = segments.get(1, file_entry(NONCE, "n"))
    segment(tmp_path, 1, nonce=NONCE + 1)
    after = segments.get(1, file_entry(NONCE + 1, "n"))
    assert before is not None
    assert after is not None
    assert before.gone
    assert after.nonce == NONCE + 1
    assert segments.get(1, file_entry(NONCE + 1, "n")) is after


def test_a_long_name_of_a_namespace_is_read_whole(tmp_path: Path, segments: MappedSegments) -> None:
    name = "n" * 10_000
    segment(tmp_path, 1, namespace=name)
    found = segments.get(1, file_entry(NONCE, name))
    assert found is not None
    assert found.namespace == name


def test_those_read_longest_ago_make_room_and_those_looked_at_count(
    tmp_path: Path, segments: MappedSegments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_segments, "most_mapped", lambda *, keep_open: 3)
    entry = file_entry(NONCE, "n")
    for number in range(6):
        segment(tmp_path, number)
    for number in range(3):
        found = segments.get(number, entry)
        assert found is not None
        found.used = 10 - number
        del found
    assert segments.get(3, entry) is not None
    assert segments.numbers() == [0, 1, 3]
    held = [found.view[:10] for number in (0, 1, 3) if (found := segments.get(number, entry))]
    del found
    assert segments.get(4, entry) is None, "three are looked at"
    assert len(mappings(tmp_path)) == 3
    held.pop()
    assert segments.get(5, entry) is not None


def test_the_room_for_mappings_follows_from_what_the_process_may_have() -> None:
    assert 8 <= most_mapped(keep_open=True) <= most_mapped(keep_open=False) <= 1 << 30


def test_a_file_system_without_nameless_files_keeps_descriptors(tmp_path: Path) -> None:
    assert not locks_stay_with_mappings("/proc")
    assert not locks_stay_with_mappings(str(tmp_path / "absent"))


def test_a_mapping_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise OSError("no more mappings")

    monkeypatch.setattr(local_segments, "Mapping", refuse)
    before = descriptors(tmp_path)
    with pytest.raises(OSError, match="no more"):
        map_segment(str(path), 1, NONCE, keep_open=True)
    assert descriptors(tmp_path) == before
