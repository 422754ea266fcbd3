"""After a resume in the middle nothing of what was had is read again before the first sample comes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from tests.unit import shards
from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset, CachedIterableDataset
from torchcache.model import Extent

__all__ = ["pool"]

COUNT, HAD = 2000, 1450
BLOCK_ROWS = 100
PARTS = 2 * 256
"""Samples: those that are read at once, and as many that are read ahead."""

FOOTER_BYTES = 64 * 1024


@pytest.fixture(autouse=True)
def for_iterables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache.data.iterable.connect", lambda given: given)


def asked(pool: SamplePool) -> list[Extent]:
    return [extent for extents in pool.reads for extent in extents if not extent.object.id.is_sample]


def first_after_resume(pool: SamplePool, source: str, had: int = HAD) -> Any:
    """The first sample after `had` of them; `pool.reads` is what was read for it, and ahead of it."""

    def dataset() -> CachedIterableDataset:
        return CachedIterableDataset(source, pool=pool)  # type: ignore[arg-type]

    stopped = dataset()
    reading = iter(stopped)
    for _ in range(had):
        next(reading)
    state = stopped.state_dict()
    reading.close()  # type: ignore[attr-defined]
    resumed = dataset()
    resumed.load_state_dict(state)
    pool.reads.clear()
    reading = iter(resumed)
    sample = next(reading)
    reading.close()  # type: ignore[attr-defined]
    return sample


@pytest.mark.parametrize("kind", ["tar", "jsonl", "tfrecord"])
def test_records_are_read_from_the_first_that_is_left(pool: SamplePool, kind: str) -> None:
    data = shards.WRITERS[kind](range(COUNT))
    begins = data.index(b"folder/%06d." % HAD) if kind == "tar" else len(shards.WRITERS[kind](range(HAD)))
    pool.put(f"s3://b/x.{kind}", data)
    assert shards.NUMBER[kind](first_after_resume(pool, f"s3://b/x.{kind}")) == HAD
    assert 0 < len(asked(pool)) <= PARTS
    assert min(extent.offset for extent in asked(pool)) == begins


def blocks() -> pa.Table:
    chance = np.random.default_rng(0)
    return pa.table({"n": range(COUNT), "data": [chance.bytes(1024) for _ in range(COUNT)]})


def parquet() -> tuple[bytes, int]:
    sink = io.BytesIO()
    pq.write_table(blocks(), sink, row_group_size=BLOCK_ROWS, use_dictionary=False)
    group = pq.ParquetFile(io.BytesIO(sink.getvalue())).metadata.row_group(HAD // BLOCK_ROWS)
    return sink.getvalue(), group.column(0).data_page_offset


def arrow() -> tuple[bytes, int]:
    sink = io.BytesIO()
    at = 0
    with pa.ipc.new_file(sink, blocks().schema) as writer:
        for number, batch in enumerate(blocks().to_batches(max_chunksize=BLOCK_ROWS)):
            at = sink.tell() if number == HAD // BLOCK_ROWS else at
            writer.write_batch(batch)
    return sink.getvalue(), at


@pytest.mark.parametrize("made", [parquet, arrow])
def test_blocks_are_read_from_the_one_that_is_left(pool: SamplePool, made: Any) -> None:
    data, begins = made()
    pool.put(f"s3://b/x.{made.__name__}", data)
    assert first_after_resume(pool, f"s3://b/x.{made.__name__}")["n"] == HAD
    body = [e for e in asked(pool) if e.offset < len(data) - FOOTER_BYTES and e.length > 8]
    assert min(extent.offset for extent in body) == begins
    assert sum(extent.length for extent in body) <= len(data) - begins


@pytest.mark.parametrize("kind", ["tar.zst", "jsonl.gz", "parquet.zst", "arrows"])
def test_what_can_only_be_read_from_the_front_is(pool: SamplePool, kind: str) -> None:
    """The exceptions: a resume skips through the shard in the middle of which one stopped."""
    name, _, packing = kind.partition(".")
    data = shards.packed(shards.WRITERS[name](range(COUNT)), packing and f".{packing}")
    pool.put(f"s3://b/x.{kind}", data)
    assert shards.NUMBER[name](first_after_resume(pool, f"s3://b/x.{kind}")) == HAD
    assert min(extent.offset for extent in asked(pool)) == 0


def test_of_a_compressed_dataset_only_the_shard_in_the_middle(pool: SamplePool) -> None:
    for number in range(4):
        samples = range(number * COUNT, (number + 1) * COUNT)
        pool.put(f"s3://b/{number}.jsonl.gz", shards.packed(shards.jsonl(samples), ".gz"))
    had = 2 * COUNT + HAD
    assert first_after_resume(pool, "s3://b/{0..3}.jsonl.gz", had)["n"] == had
    assert {extent.object.id.key for extent in asked(pool)} <= {"b/2.jsonl.gz", "b/3.jsonl.gz"}


def test_a_map_style_dataset_reads_the_next_batch_alone(pool: SamplePool) -> None:
    for number in range(COUNT):
        pool.put(f"s3://b/d/{number:04d}", b"%04d" % number)
    dataset = CachedDataset.from_files("s3://b/d", pool=pool)  # type: ignore[arg-type]

    def loader() -> StatefulDataLoader[Any]:
        sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
        return StatefulDataLoader(dataset, batch_size=10, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    stopped = loader()
    batches = iter(stopped)
    for _ in range(HAD // 10):
        next(batches)
    state = stopped.state_dict()
    expected = next(batches)
    resumed = loader()
    resumed.load_state_dict(state)
    pool.reads.clear()
    assert next(iter(resumed)) == expected
    assert sorted(extent.object.id.key for extent in asked(pool)) == sorted(
        f"b/d/{sample.decode()}" for sample in expected
    )
