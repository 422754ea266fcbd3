"""What every lane must do with a server that lies: no wrong byte, and an error of ours by the deadline."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.conformance.lane import good, put_sample, read, sample
from tests.conformance.standin import Script, StandIn
from torchcache.errors import DeadlineExceeded, IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.lanes.base import Lane
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, Extent, chunk_digest
from torchcache.wire.codec import READ_SCHEMA, Piece, encode_pieces, failed_piece

Batches = Iterator[pa.RecordBatch]

SIZES = [40_000, 10, CHUNK_BYTES + 3 * BLOCK_BYTES + 5, 0, 70_000]


def signed(piece: Piece, data: bytes, **fields: object) -> Piece:
    """Other bytes with a checksum that fits them: only place or size can give them away."""
    digests = struct.pack("<Q", chunk_digest(data))
    return piece._replace(data=pa.py_buffer(data), digests=digests, whole=True, **fields)


def each(change: Callable[[Piece], Piece]) -> Callable[[list[Piece]], list[Piece]]:
    return lambda pieces: [change(piece) for piece in pieces]


SWAPPED = "of each other's extents"
"""Found out by their sizes. Nothing tells alike ones apart that a server swaps: the checksums come from it too."""

PIECES: dict[str, Callable[[list[Piece]], list[Piece]]] = {
    "nothing at all": lambda p: [],
    "wrong bytes": each(lambda p: p._replace(data=pa.py_buffer(bytes(p.data.size)))),
    "wrong checksums": each(lambda p: p._replace(digests=bytes(len(p.digests)))),
    "no checksums": each(lambda p: p._replace(digests=b"")),
    "many checksums": each(lambda p: p._replace(digests=p.digests * 1000)),
    "another size": each(lambda p: p._replace(object_size=p.object_size + 1)),
    "a negative size": each(lambda p: p._replace(object_size=-1)),
    "a huge size": each(lambda p: p._replace(object_size=(1 << 63) - 1)),
    "another place": each(lambda p: p._replace(offset=p.offset + BLOCK_BYTES)),
    "a negative place": each(lambda p: p._replace(offset=-(1 << 63))),
    "a far place": each(lambda p: p._replace(offset=(1 << 63) - 1)),
    "shorter, signed": each(lambda p: signed(p, bytes(p.data)[:-1])),
    "longer, signed": each(lambda p: signed(p, bytes(p.data) + b"x")),
    "nothing, signed": each(lambda p: signed(p, b"")),
    "of extents not asked for": each(lambda p: p._replace(extent=len(SIZES))),
    "of the last extent there can be": each(lambda p: p._replace(extent=(1 << 32) - 1)),
    SWAPPED: each(lambda p: p._replace(extent=(p.extent + 1) % len(SIZES))),
    "backwards": lambda p: p[::-1],
    "every piece twice": lambda p: [piece for piece in p for _ in range(2)],
    "the last chunk left out": lambda p: [piece for piece in p if not (piece.extent == 2 and piece.offset)],
    "an error without sense": lambda p: [failed_piece(piece.extent, "}{") for piece in p],
    "an error of no class of ours": lambda p: [
        failed_piece(piece.extent, json.dumps({"error": "SystemExit", "message": "x"})) for piece in p
    ],
    "an error that is no object": lambda p: [failed_piece(piece.extent, "[1, 2]") for piece in p],
}

OTHER_SCHEMA = pa.schema([("extent", pa.uint32())])


def with_nulls(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [pa.nulls(batch.num_rows, field.type) for field in READ_SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=READ_SCHEMA)


def endless(batches: Batches) -> Batches:
    """What is asked for, and then the first row over and over: never an end."""
    first = next(batches)
    yield first
    yield from batches
    yield from itertools.repeat(first)


def giant(batches: Batches) -> Batches:
    """A message far larger than any server of ours sends."""
    huge = Piece(0, SIZES[0], 0, True, b"12345678", pa.py_buffer(bytes(40 * 1024 * 1024)))
    yield encode_pieces([huge])


STREAMS: dict[str, Callable[[Batches], Any]] = {
    "another schema": lambda _: fl.RecordBatchStream(pa.table({"extent": pa.array([1, 2], pa.uint32())})),
    "no batches": lambda _: fl.GeneratorStream(READ_SCHEMA, iter(())),
    "nulls": lambda batches: fl.GeneratorStream(READ_SCHEMA, map(with_nulls, batches)),
    "empty batches": lambda batches: fl.GeneratorStream(READ_SCHEMA, (b.slice(0, 0) for b in batches)),
    "endless": lambda batches: fl.GeneratorStream(READ_SCHEMA, endless(batches)),
    "a giant message": lambda batches: fl.GeneratorStream(READ_SCHEMA, giant(batches)),
}


class LiesContract:
    """Of a lane that believes no word of a server. `liar` answers for what isn't resident."""

    def make_lane(self, liar: StandIn) -> Lane:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def liar(cls) -> Iterator[StandIn]:
        with StandIn(Script()) as liar:
            yield liar

    @pytest.fixture
    def lane(self, liar: StandIn) -> Iterator[Lane]:
        lane = self.make_lane(liar)
        yield lane
        liar.script.tamper, liar.script.stream = lambda _, pieces: pieces, None
        lane.close()

    @pytest.fixture
    def right(self, liar: StandIn, lane: Lane) -> list[bytes]:
        return [put_sample(lane, f"lie-{size}", size) for size in SIZES]

    def assert_no_wrong_byte(
        self, lane: Lane, right: list[bytes], *, known: bool, seconds: float = 60.0
    ) -> list[TorchCacheError]:
        """Reads all, half of it into buffers; the errors that came."""
        extents = [Extent(sample(f"lie-{size}", size if known else -1)) for size in SIZES]
        memory = [memoryview(bytearray(size)) if i % 2 else None for i, size in enumerate(SIZES)]
        outcomes = read(lane, extents, memory, seconds=seconds)
        errors = [outcome for outcome in outcomes if isinstance(outcome, TorchCacheError)]
        for outcome, data in zip(outcomes, right, strict=True):
            assert isinstance(outcome, TorchCacheError) or outcome == data, "I1"
        return errors

    @pytest.mark.hostile("pages")
    @pytest.mark.parametrize(
        ("lie", "known"),
        [(lie, known) for lie in PIECES for known in (True, False) if known or lie != SWAPPED],
    )
    def test_a_lie_about_pieces(
        self, liar: StandIn, lane: Lane, right: list[bytes], lie: str, known: bool
    ) -> None:
        liar.script.tamper = lambda _, pieces: PIECES[lie](pieces)
        errors = self.assert_no_wrong_byte(lane, right, known=known)
        assert errors
        if not lie.startswith("an error") and (
            known or lie != "a huge size"
        ):  # more than there is memory for
            assert {type(error) for error in errors} == {IntegrityError}
        liar.script.tamper = lambda _, pieces: pieces
        assert not self.assert_no_wrong_byte(lane, right, known=known), "the next call is well"

    @pytest.mark.hostile("pages")
    @pytest.mark.parametrize("lie", STREAMS)
    def test_a_stream_that_is_none_of_ours(
        self, liar: StandIn, lane: Lane, right: list[bytes], lie: str
    ) -> None:
        liar.script.stream = STREAMS[lie]
        errors = self.assert_no_wrong_byte(lane, right, known=True, seconds=2.0 if lie == "endless" else 60.0)
        if lie != "endless":
            assert len(errors) == len(SIZES)
        assert {type(error) for error in errors} <= {IntegrityError, DeadlineExceeded, ServerUnavailable}
        liar.script.stream = None
        assert not self.assert_no_wrong_byte(lane, right, known=True), "the next call is well"

    def test_what_came_before_the_lie_is_good(self, liar: StandIn, lane: Lane, right: list[bytes]) -> None:
        """Rows come in order here: a stream that turns bad costs only what had not come."""
        liar.script.tamper = lambda _, pieces: [*pieces[:2], pieces[2]._replace(extent=99), *pieces[3:]]
        extents = [Extent(sample(f"lie-{size}", size)) for size in SIZES]
        outcomes = read(lane, extents)
        assert [good(outcome) for outcome in outcomes[:2]] == right[:2]
        assert {type(outcome) for outcome in outcomes[2:]} == {IntegrityError}
