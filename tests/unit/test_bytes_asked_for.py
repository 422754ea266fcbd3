"""How much of columnar shards is read through the pool: only what is wanted."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fuzz.mutating import mutated
from tests.unit.sample_pool import SamplePool, pool
from torchcache.data.formats import Arrow, Parquet
from torchcache.data.formats.arrow_headers import _BLOCK, _blocks, batch_rows
from torchcache.data.formats.base import BlockFormat
from torchcache.data.iterable_file import open_parts
from torchcache.data.iterable_index import index_of
from torchcache.errors import IntegrityError
from torchcache.model import Extent

__all__ = ["pool"]

KIB = 1024
ROWS, BLOCKS, COLUMNS = 40_000, 4, list("abcdefgh")
COLUMN_BYTES = ROWS * 8  # of one block


def asked(pool: SamplePool) -> list[Extent]:
    return [extent for extents in pool.reads for extent in extents if not extent.object.id.is_sample]


def asked_bytes(pool: SamplePool) -> int:
    return sum(extent.length for extent in asked(pool))


# ---- columns ----


def wide() -> pa.Table:
    chance = np.random.default_rng(0)
    numbers = {name: chance.integers(0, 1 << 60, ROWS * BLOCKS) for name in COLUMNS}
    return pa.table(numbers)


def arrow_file(table: pa.Table, rows: int, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return sink.getvalue()


def parquet_file(table: pa.Table, rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows, use_dictionary=False, compression="none")
    return sink.getvalue()


WRITERS: dict[str, tuple[Callable[..., BlockFormat], Callable[[pa.Table, int], bytes]]] = {
    "arrow": (Arrow, arrow_file),
    "parquet": (Parquet, parquet_file),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_counted_by_what_says_them(pool: SamplePool, kind: str) -> None:
    make, write = WRITERS[kind]
    info = pool.put(f"s3://b/x.{kind}", write(wide(), ROWS))
    index = index_of(open_parts(pool, info, "b"), info, make(), "x")
    assert index.rows is not None and index.rows.tolist() == [ROWS] * BLOCKS
    # Of Parquet 64 KiB at the end; of Arrow 16 KiB at the end and of each batch.
    assert asked_bytes(pool) <= 2 * 64 * KIB + BLOCKS * 20 * KIB
    assert info.size > 10_000 * KIB


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("columns", [["c"], ["f", "b"]])
def test_of_a_block_the_columns_asked_for_are_read(pool: SamplePool, kind: str, columns: list[str]) -> None:
    make, write = WRITERS[kind]
    table = wide()
    info = pool.put(f"s3://b/x.{kind}", write(table, ROWS))
    reader = make(columns=columns).open(open_parts(pool, info, "b"), "x")
    assert asked_bytes(pool) <= 70 * KIB, "the end of the file"
    pool.reads.clear()
    assert reader.read(2).equals(table.slice(2 * ROWS, ROWS).select(columns))
    assert 0 <= asked_bytes(pool) - len(columns) * COLUMN_BYTES <= len(columns) * 4 * KIB


@pytest.mark.parametrize("kind", WRITERS)
def test_a_whole_block_is_one_read(pool: SamplePool, kind: str) -> None:
    make, write = WRITERS[kind]
    info = pool.put(f"s3://b/x.{kind}", write(wide(), ROWS))
    reader = make().open(open_parts(pool, info, "b"), "x")
    pool.reads.clear()
    reader.read(1)
    [extent] = asked(pool)
    assert 0 <= extent.length - len(COLUMNS) * COLUMN_BYTES <= len(COLUMNS) * 4 * KIB


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("rows", [1, 7, 1000, 5000])
def test_rows_of_batches_are_as_arrow_says(compression: str | None, rows: int) -> None:
    words = pa.array(["x", None, "y"] * 1000)
    table = pa.table({"n": range(3000), "words": words, "kinds": words.dictionary_encode()})
    data = arrow_file(table, rows, compression)
    file = pa.ipc.open_file(data)
    expected = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
    assert batch_rows(io.BytesIO(data), "x") == expected
    reader = Arrow(columns=["kinds", "n"]).open(io.BytesIO(data), "x")
    last = reader.read(len(expected) - 1)
    assert last.to_pylist() == table.select(["kinds", "n"]).slice(3000 - expected[-1]).to_pylist()


def test_a_name_that_columns_share() -> None:
    table = pa.table([pa.array([1, 2]), pa.array([3, 4]), pa.array([5, 6])], names=["a", "b", "a"])
    reader = Arrow(columns=["b"]).open(io.BytesIO(arrow_file(table, 2)), "x")
    assert reader.read(0).to_pylist() == [{"b": 3}, {"b": 4}]


def test_an_arrow_file_that_is_cut_in_the_middle() -> None:
    data = arrow_file(wide().slice(0, 3000), 1000)
    with pytest.raises(IntegrityError, match="a batch goes beyond the end"):
        batch_rows(io.BytesIO(data[-2000:]), "x")


def test_a_footer_that_names_the_same_bytes_again_and_again() -> None:
    data = arrow_file(pa.table({"n": range(20)}), 1)
    for block in [*_blocks(io.BytesIO(data), "x")]:
        data = data.replace(_BLOCK.pack(*block), _BLOCK.pack(8, len(data) // 10, 0))
    with pytest.raises(IntegrityError, match="its headers come to more than all of it"):
        batch_rows(io.BytesIO(data), "x")


class _Counted(io.BytesIO):
    """Counts the bytes that are read of it."""

    asked = 0

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self.asked += size
        return size


@pytest.mark.parametrize("negative", [0, 1, 2], ids=["offset", "header", "body"])
def test_a_footer_whose_negative_lengths_hide_the_others(negative: int) -> None:
    data = arrow_file(pa.table({"n": range(40)}), 1)
    blocks = [*_blocks(io.BytesIO(data), "x")]
    for number, block in enumerate(blocks):
        # Headers as long as nearly all of the file, and as many bytes less: in sum there are none.
        claimed = [8, len(data) - 8 if number < 20 else 8 - len(data) if negative == 1 else 0, 0]
        if number >= 20 and negative != 1:
            claimed[negative] = -8
        data = data.replace(_BLOCK.pack(*block), _BLOCK.pack(*claimed))
    file = _Counted(data)
    with pytest.raises(IntegrityError, match="a batch has a negative place or length"):
        batch_rows(file, "x")
    assert file.asked <= 2 * 16 * KIB


def test_any_bytes_have_rows_or_are_damaged() -> None:
    good = arrow_file(pa.table({"n": range(20)}), 5)
    counted = 0
    for data in mutated((good, good[-1000:]), 20_000, random.Random(7)):
        try:
            batch_rows(io.BytesIO(data), "x")
            counted += 1
        except IntegrityError:
            continue
    assert counted > 100, "or hardly any came so far"
