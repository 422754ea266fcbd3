"""Known records of mapped segments: nothing is believed that isn't sound, and nothing served that isn't as stored."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.lanes import local_records
from torchcache.lanes.local_reclaim import Reclaim
from torchcache.lanes.local_records import KnownRecords, is_intact, read_record
from torchcache.lanes.local_segments import Mapped, map_segment
from torchcache.model import BLOCK_BYTES, ObjectId, block_digests, chunk_digest
from torchcache.records import RecordHeader, SegmentHeader, encode_record, file_name, header_bytes

SIZE = 1 << 20
NONCE = 99
ID = ObjectId("s3", "bucket/key", "v1")


def record(payload: bytes, at: int, *, object_size: int | None = None, nonce: int = NONCE) -> bytes:
    identity = ID.encoded
    header = RecordHeader(
        header_bytes(len(identity), len(payload)),
        len(payload),
        0,
        len(payload) if object_size is None else object_size,
        chunk_digest(payload),
        identity,
        block_digests(payload),
    )
    return encode_record(header, nonce, at) + payload


class File:
    """A segment's file of two records, mapped, and open to be spoilt."""

    def __init__(self, folder: Path, first: bytes, *, second: bytes = b"") -> None:
        self.path = folder / file_name(1, NONCE)
        header = SegmentHeader(1, NONCE, SIZE, "n").encode()
        self.at = len(header)
        self.path.write_bytes((header + first + second).ljust(SIZE, b"\0"))
        mapped = map_segment(str(self.path), 1, NONCE, keep_open=False)
        assert mapped is not None
        self.mapped: Mapped = mapped

    def spoil(self, offset: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))


HEADER = len(SegmentHeader(1, NONCE, SIZE, "n").encode())
PAYLOAD = random.Random(3).randbytes(5 * BLOCK_BYTES + 77)


def test_a_sound_record_is_known(tmp_path: Path) -> None:
    file = File(tmp_path, record(PAYLOAD, HEADER))
    known = read_record(file.mapped, HEADER)
    assert known is not None
    assert (known.identity, known.chunk_index, known.object_size) == (ID.encoded, 0, len(PAYLOAD))
    assert bytes(known.view[known.start : known.end]) == PAYLOAD


@pytest.mark.parametrize("offset", [-64, 0, HEADER + 64, SIZE - 1, SIZE, SIZE + 64, 1 << 62])
def test_elsewhere_there_is_none(tmp_path: Path, offset: int) -> None:
    file = File(tmp_path, record(PAYLOAD, HEADER))
    assert read_record(file.mapped, offset) is None


def test_a_record_of_another_segment_or_place_is_none(tmp_path: Path) -> None:
    assert read_record(File(tmp_path, record(PAYLOAD, HEADER, nonce=NONCE + 1)).mapped, HEADER) is None
    assert read_record(File(tmp_path, record(PAYLOAD, HEADER + 64)).mapped, HEADER) is None


def test_a_payload_that_isnt_its_chunk_of_the_object_is_none(tmp_path: Path) -> None:
    assert read_record(File(tmp_path, record(PAYLOAD, HEADER, object_size=10)).mapped, HEADER) is None
    assert read_record(File(tmp_path, record(PAYLOAD, HEADER, object_size=-1)).mapped, HEADER) is None


@given(st.integers(0, header_bytes(len(ID.encoded), len(PAYLOAD)) - 1))
def test_any_wrong_bit_of_the_header_makes_it_none(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    file = File(tmp_path_factory.mktemp("s"), record(PAYLOAD, HEADER))
    file.spoil(HEADER + at)
    assert read_record(file.mapped, HEADER) is None


@given(st.integers(0, len(PAYLOAD)), st.integers(0, len(PAYLOAD)), st.integers(0, len(PAYLOAD) - 1))
def test_a_wrong_byte_is_noticed_wherever_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, one: int, other: int, spoilt: int
) -> None:
    file = File(tmp_path_factory.mktemp("s"), record(PAYLOAD, HEADER))
    known = read_record(file.mapped, HEADER)
    assert known is not None
    start, end = known.start + min(one, other), known.start + max(one, other)
    assert is_intact(known, start, end)
    file.spoil(known.start + spoilt)
    if start <= known.start + spoilt < end:
        assert not is_intact(known, start, end)


def test_an_empty_payload_is_proven_too(tmp_path: Path) -> None:
    known = read_record(File(tmp_path, record(b"", HEADER)).mapped, HEADER)
    assert known is not None
    assert is_intact(known, known.start, known.end)
    assert not is_intact(known._replace(digest=known.digest ^ 1), known.start, known.end)


def test_what_was_dropped_is_known_no_more(tmp_path: Path) -> None:
    file = File(tmp_path, record(PAYLOAD, HEADER))
    records = KnownRecords()
    place = b"place"
    assert records.get(place, file.mapped, HEADER) is records.warm[place]
    file.mapped.gone = True
    records.drop_gone()
    assert not records.warm
    assert records.get(place, file.mapped, HEADER) is not None, "who has it still may read it"
    assert not records.warm, "but it isn't kept"


def test_only_so_many_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(tmp_path, record(PAYLOAD, HEADER))
    monkeypatch.setattr(local_records, "MAX_KNOWN", 10)
    records = KnownRecords()
    for number in range(100):
        assert records.get(b"%d" % number, file.mapped, HEADER) is not None
        assert len(records._known) <= 10
        assert len(records.warm) <= 10


def test_a_file_that_lost_its_end_is_an_error_and_no_crash(tmp_path: Path) -> None:
    file = File(tmp_path, record(PAYLOAD, HEADER))
    with file.path.open("r+b") as opened:
        opened.truncate(4096)
    with pytest.raises(OSError):
        KnownRecords().get(b"place", file.mapped, HEADER)


def vmstat(path: Path, *, stolen: int, dropped: int = 0) -> None:
    path.write_text(
        f"nr_free_pages 5\nnr_inactive_file 400\nnr_active_file 240\npgsteal_anon 0\npgsteal_file {stolen}\n"
        f"drop_pagecache {dropped}\n"
    )


def test_pages_are_doubted_once_the_kernel_took_a_telling_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchcache.lanes.local_reclaim.LOOK_S", 0.0)
    path = tmp_path / "vmstat"
    reclaim = Reclaim(str(path))
    vmstat(path, stolen=1000)
    assert reclaim.happened(), "who knows what was before"
    assert not reclaim.happened()
    vmstat(path, stolen=1010)
    assert not reclaim.happened()
    vmstat(path, stolen=1011)
    assert reclaim.happened(), "more than one in 64 of 640"
    assert not reclaim.happened()
    vmstat(path, stolen=1011, dropped=1)
    assert reclaim.happened()


def test_a_kernel_that_doesnt_tell_is_always_doubted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache.lanes.local_reclaim.LOOK_S", 0.0)
    assert all(Reclaim(str(tmp_path / "absent")).happened() for _ in range(3))
    (tmp_path / "vmstat").write_text("nr_free_pages 5\n")
    other = Reclaim(str(tmp_path / "vmstat"))
    assert other.happened()
    assert other.happened()


def test_this_kernel_tells() -> None:
    reclaim = Reclaim()
    reclaim.happened()
    assert reclaim._before is not None
