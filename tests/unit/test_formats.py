"""The formats of shards: what libraries write is read, and nothing but IntegrityError comes of what is damaged."""

from __future__ import annotations

import io
import itertools
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import shards
from torchcache.data import formats
from torchcache.data.formats import base, compression
from torchcache.data.formats.base import Format, RecordFormat
from torchcache.data.formats.crc32c import crc32c
from torchcache.data.formats.tar import members
from torchcache.data.formats.tfrecord import masked
from torchcache.errors import ConfigurationError, IntegrityError

RECORDS: dict[str, RecordFormat] = {
    "tar": formats.Tar(),
    "jsonl": formats.JsonLines(),
    "tfrecord": formats.TFRecord(),
    "raw": formats.Raw(record_bytes=8, header_bytes=4),
}
BLOCKS: dict[str, Any] = {"parquet": formats.Parquet(), "arrow": formats.Arrow(), "arrows": formats.Arrow()}


def cut(format: RecordFormat, data: bytes) -> list[tuple[int, bytes]]:
    return list(format.frames(io.BytesIO(data), "shard"))


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_records_one_behind_the_other_and_each_alone(name: str, count: int) -> None:
    format, data = RECORDS[name], shards.WRITERS[name](range(count))
    frames = cut(format, data)
    assert [shards.NUMBER[name](format.record(memoryview(f), "r", 3)) for _, f in frames] == list(
        range(count)
    )
    bounds = [start for start, _ in frames] + [len(data)]  # up to the next one: with what is between
    alone = [format.record(memoryview(data)[a:b], "r", 3) for a, b in itertools.pairwise(bounds)]
    assert [shards.NUMBER[name](sample) for sample in alone] == list(range(count))
    told = format.starts(len(data), "shard")
    if told is not None:
        assert told.tolist() == bounds


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_read_alone(name: str) -> None:
    reader = BLOCKS[name].open(io.BytesIO(shards.WRITERS[name](range(23))), "shard")
    rows = reader.rows()
    assert sum(rows) == 23 and len(rows) > 3
    assert reader.seekable is (name != "arrows")
    order = range(len(rows)) if not reader.seekable else [2, 0, 3, 1]
    firsts = np.concatenate([[0], np.cumsum(rows)])
    for block in order:
        found = reader.read(block)
        assert found.column("n").to_pylist() == list(range(firsts[block], firsts[block + 1]))


@pytest.mark.parametrize("kind", [formats.Parquet, formats.Arrow])
def test_columns(kind: Callable[..., Any]) -> None:
    data = shards.WRITERS[kind.name](range(9))  # type: ignore[attr-defined]
    assert kind(columns=["text"]).open(io.BytesIO(data), "shard").read(0).column_names == ["text"]
    with pytest.raises(ConfigurationError, match="no column 'x'; it has n, text"):
        kind(columns=["x"]).open(io.BytesIO(data), "shard")


# ---- tar ----


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_dialect(format: int) -> None:
    """Long names, names that aren't ASCII, folders and links, as Python's tarfile writes them."""
    names = ["a/b.jpg", "a/b.CLS", "é/" + "x" * 90 + ".seg.png", "d" * 80 + "/" + "n" * 90 + ".txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "name.txt")
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"%03d" % i))
            link = tarfile.TarInfo(f"link{i}.txt")
            link.type, link.linkname, link.size = tarfile.SYMTYPE, name[:99], 0
            archive.addfile(link)
    found = [(m.name, m.data) for m in members(io.BytesIO(sink.getvalue()), "t") if m.is_file]
    assert found == [(name, b"%03d" % i) for i, name in enumerate(names)]
    tar = formats.Tar()
    samples = [tar.record(memoryview(frame), "r", 3) for _, frame in cut(tar, sink.getvalue())]
    assert samples[0] == {"__key__": "a/b", "jpg": b"000", "cls": b"001", "__url__": "r"}
    assert samples[1] == {"__key__": "é/" + "x" * 90, "seg.png": b"002", "__url__": "r"}
    assert len(samples) == len(names) - 1


def one_member(name: str, data: bytes = b"data", **fields: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.mark.parametrize("name", ["../../etc/passwd.txt", "/etc/passwd.txt", "a/../../b.txt", "C:\\x.txt"])
def test_names_are_keys_and_never_paths(name: str) -> None:
    tar = formats.Tar()
    [(_, frame)] = cut(tar, one_member(name))
    assert tar.record(memoryview(frame), "r", 3) == {
        "__key__": name.removesuffix(".txt"),
        "txt": b"data",
        "__url__": "r",
    }


def test_members_of_no_sample() -> None:
    parts = [one_member(n)[:1024] for n in ("__meta__", "noextension", ".hidden", "a.txt")]
    tar = formats.Tar()
    [(start, frame)] = cut(tar, b"".join(parts))
    assert start == 3 * 1024
    assert tar.record(memoryview(frame), "r", 3) == {"__key__": "a", "txt": b"data", "__url__": "r"}


def test_a_key_twice_in_a_sample() -> None:
    tar = formats.Tar()
    [(_, frame)] = cut(tar, one_member("a.txt")[:1024] + one_member("a.TXT"))
    with pytest.raises(IntegrityError, match="sample 'a' has two members 'txt'"):
        tar.record(memoryview(frame), "r", 3)


def rechecked(header: bytes, at: int, field: bytes) -> bytes:
    """A tar header with another field, and a checksum that is right."""
    changed = bytearray(header[:512])
    changed[at : at + len(field)] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed) + header[512:]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (b"77777777777\0", "claims a record of"),
        (b"\x80" + b"\x7f" * 11, "claims a record of"),
        (b"\xff" * 12, "no sound size"),
        (b"-0000000010\0", "no sound size"),
        (b"00000002000\0", "cut short"),
    ],
)
def test_sizes_that_a_tar_only_claims(field: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        cut(formats.Tar(), rechecked(one_member("a.txt")[:1024], 124, field))


def test_attributes_without_end() -> None:
    for kind in (b"L", b"x"):
        with pytest.raises(IntegrityError, match="bytes of attributes"):
            cut(formats.Tar(), rechecked(rechecked(one_member("a.txt"), 156, kind), 124, b"00077777777\0"))
    for attributes in (b"3 a\n", b"0 path=x\n", b"99 path=x\n", b"path=x\n", b"12 path=x"):
        member = rechecked(one_member("a.txt", attributes), 156, b"x")
        with pytest.raises(IntegrityError, match="pax header at byte 0 is malformed"):
            cut(formats.Tar(), member)


# ---- TFRecord ----


def test_crc32c() -> None:
    """The vectors of RFC 3720, B.4, and every way through the tables against the definition."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(0).bytes(200_000)
    for size in (0, 1, 3, 63, 64, 65, 1023, 1024, 1025, 4096, 65_536, 65_600, 200_000):
        assert crc32c(data[:size]) == by_definition(data[:size]), size


def by_definition(data: bytes) -> int:
    crc = 0xFFFFFFFF
    table = []
    for byte in range(256):
        entry = byte
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_a_record_of_tensorflow() -> None:
    """The bytes that tf.io.TFRecordWriter writes for b"foo"; from TensorFlow's own documentation of the format."""
    data = struct.pack("<Q", 3) + struct.pack("<I", masked(struct.pack("<Q", 3))) + b"foo"
    [(_, frame)] = cut(formats.TFRecord(), data + struct.pack("<I", masked(b"foo")))
    assert formats.TFRecord().record(memoryview(frame), "r", 3) == b"foo"


def test_every_flipped_bit_of_a_tfrecord_is_found() -> None:
    good = shards.tf_frame(b"some data of a record")
    format = formats.TFRecord()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            for _, frame in cut(format, bytes(bad)):
                format.record(memoryview(frame), "r", 3)


def test_a_giant_length_with_a_right_checksum() -> None:
    head = struct.pack("<Q", 1 << 62)
    with pytest.raises(IntegrityError, match="at most 1,073,741,824"):
        cut(formats.TFRecord(), head + struct.pack("<I", masked(head)))


# ---- JSON lines, raw ----


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b"\xff\xfe", b"nul", b"{}{}"])
def test_lines_that_are_no_json(line: bytes) -> None:
    format = formats.JsonLines()
    [(_, frame)] = cut(format, line)
    with pytest.raises(IntegrityError, match=r"record 3 of r is damaged: it is no JSON"):
        format.record(memoryview(frame), "r", 3)


def test_lines_with_a_byte_order_mark() -> None:
    format = formats.JsonLines()
    [(_, first), (_, second)] = cut(format, b'\xef\xbb\xbf{"a": 1}\n["\xc3\xa9"]')
    assert [format.record(memoryview(line), "r", 0) for line in (first, second)] == [{"a": 1}, ["é"]]


def test_raw_records_that_do_not_come_out_even() -> None:
    format = formats.Raw(record_bytes=8)
    with pytest.raises(IntegrityError, match="4 bytes are left at byte 16"):
        cut(format, bytes(20))
    with pytest.raises(IntegrityError, match="4 bytes are left at byte 16"):
        format.starts(20, "shard")
    with pytest.raises(ConfigurationError, match="record_bytes=0"):
        formats.Raw(record_bytes=0)


# ---- anything ----


@pytest.mark.parametrize("name", [*RECORDS, *BLOCKS])
@given(data=st.data())
def test_damage_is_nothing_but_an_integrity_error(name: str, data: st.DataObject) -> None:
    """Cut short, overwritten or made of nothing: read to the end, or IntegrityError."""
    whole = shards.WRITERS[name](range(20))
    size = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    damaged = bytearray(whole[:size])
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        damaged[at : at + 8] = data.draw(st.binary(max_size=8))
    try:
        if name in RECORDS:
            for _, frame in cut(RECORDS[name], bytes(damaged)):
                RECORDS[name].record(memoryview(frame), "r", 3)
        else:
            columns = data.draw(st.sampled_from([None, ["text"]]))
            reader = type(BLOCKS[name])(columns=columns).open(io.BytesIO(bytes(damaged)), "shard")
            for block in range(len(reader.rows())):
                table = reader.read(block)
                base.rows_of(table, list(range(table.num_rows)), "shard")
    except ConfigurationError as error:
        assert "has no column 'text'" in str(error)  # for it has another name now
    except IntegrityError as error:
        assert "shard" in str(error) or "r" in str(error)


# ---- compression ----


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_compressed_streams(suffix: str) -> None:
    data = shards.jsonl(range(500))
    packed = shards.packed(data, suffix) + shards.packed(
        data, suffix
    )  # several frames, as parallel packers write
    codec = compression.CODECS[suffix]
    assert compression.unpacked(io.BytesIO(packed), codec, len(packed), "s").read() == data + data
    for bad in (packed[:-9], b"nothing like it", packed[:40] + b"\0\0\0\0" + packed[44:]):
        with pytest.raises(IntegrityError, match="s is damaged: it can't be unpacked"):
            compression.unpacked(io.BytesIO(bad), codec, len(bad), "s").read()


@pytest.mark.hostile("bombs")
def test_a_compression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pa.compress(bytes(1 << 27), codec="zstd", asbytes=True)
    stream = compression.unpacked(io.BytesIO(bomb), "zstd", len(bomb), "s")
    taken = 0
    with pytest.raises(IntegrityError, match="a compression bomb"):
        while data := stream.read(1 << 20):
            taken += len(data)
    assert taken <= compression.MOST_TIMES * len(bomb) + compression.MOST_FLOOR_BYTES
    monkeypatch.setattr(compression, "MOST_HELD_BYTES", 1 << 20)
    with pytest.raises(IntegrityError, match="held in memory"):
        compression.held_whole(io.BytesIO(bytes(1 << 21)), "s")


def test_a_record_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache.data.formats.jsonlines.MAX_RECORD_BYTES", 1 << 21)
    with pytest.raises(IntegrityError, match="the line at byte 0 has more than"):
        cut(formats.JsonLines(), b"x" * (1 << 22))
    monkeypatch.setattr("torchcache.data.formats.tar.MAX_RECORD_BYTES", 1 << 12)
    with pytest.raises(IntegrityError, match="a sample of the tar has more than"):
        cut(formats.Tar(), b"".join(one_member(f"a.{i}")[:1024] for i in range(20)))
    assert base.MAX_RECORD_BYTES == 1 << 30


# ---- names ----


@pytest.mark.parametrize(
    ("key", "name", "codec"),
    [
        ("a/b.tar", "tar", None),
        ("b.TAR.gz", "tar", "gzip"),
        ("b.tgz", "tar", "gzip"),
        ("b.jsonl.zst", "jsonl", "zstd"),
        ("b.parquet", "parquet", None),
        ("b.arrow", "arrow", None),
        ("b.tfrecord.gz", "tfrecord", "gzip"),
    ],
)
def test_the_name_says_the_format(key: str, name: str, codec: str | None) -> None:
    assert formats.format_of(None, [key]).name == name
    assert formats.codec_of(key) == codec
    assert formats.is_shard(key)


def test_names_that_do_not() -> None:
    with pytest.raises(ConfigurationError, match=r"b\.bin says no format: give format="):
        formats.format_of(None, ["b.bin"])
    with pytest.raises(ConfigurationError, match=r"several: b\.parquet \(parquet\), a\.tar \(tar\)"):
        formats.format_of(None, ["a.tar", "b.parquet"])
    with pytest.raises(ConfigurationError, match=r"Raw\(record_bytes=...\)"):
        formats.format_of("raw", ["x"])
    given: Format = formats.Raw(record_bytes=3)
    assert formats.format_of(given, ["x"]) is given
    assert formats.format_of("jsonl", ["x.json"]).name == "jsonl"
