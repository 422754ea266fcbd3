"""Putting pieces together: right bytes from a good server, no wrong byte from a lying one."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.standin import pieces_of
from torchcache.errors import ConfigurationError, IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.lanes.assembly import Arrivals
from torchcache.model import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    UNKNOWN_SIZE,
    Extent,
    ObjectId,
    ObjectInfo,
    chunk_digest,
)
from torchcache.wire.codec import Piece, encode_pieces, failed_piece
from torchcache.wire.status import encode_error

ID = ObjectId("s3", "bucket/key", "v1")
DATA = random.Random(1).randbytes(2 * CHUNK_BYTES + 3 * BLOCK_BYTES + 5)
SMALL = ObjectInfo(ID, BLOCK_BYTES + 5)
"""The first bytes of DATA, in one chunk."""


def outcome(
    extent: Extent, pieces: list[Piece], into: memoryview | None = None
) -> memoryview | TorchCacheError:
    arrivals = Arrivals([extent], [into], "server")
    for piece in pieces:
        arrivals.take(encode_pieces([piece]))
    (found,) = arrivals.outcomes(None)
    return found


def good(start: int, end: int, data: bytes = DATA) -> list[Piece]:
    return list(pieces_of(0, data, start, end))


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    near = st.sampled_from([0, BLOCK_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES, len(DATA)])
    edges = st.builds(lambda edge, by: min(max(edge + by, 0), len(DATA)), near, st.integers(-3, 3))
    start, end = sorted((draw(edges), draw(edges)))
    return start, end


@given(span=spans(), known=st.booleans(), to_end=st.booleans(), given_buffer=st.booleans())
def test_the_bytes_asked_for(span: tuple[int, int], known: bool, to_end: bool, given_buffer: bool) -> None:
    start, end = (span[0], len(DATA)) if to_end else span
    info = ObjectInfo(ID, len(DATA) if known else UNKNOWN_SIZE)
    extent = Extent(info, start, -1 if to_end else end - start)
    into = memoryview(bytearray(end - start + 2)) if given_buffer else None
    view = outcome(extent, good(start, end), into)
    assert isinstance(view, memoryview)
    assert bytes(view) == DATA[start:end]
    assert into is None or bytes(into[-2:]) == b"\0\0"


def changed(piece: Piece, **fields: object) -> Piece:
    return piece._replace(**fields)


def flipped(piece: Piece, at: int = 0) -> Piece:
    data = bytearray(piece.data)
    data[at] ^= 1
    return changed(piece, data=pa.py_buffer(bytes(data)))


def signed(piece: Piece, data: bytes, **fields: object) -> Piece:
    """A piece whose checksum is right: only its place or size can give it away."""
    digests = struct.pack("<Q", chunk_digest(data))
    return changed(piece, data=pa.py_buffer(data), digests=digests, whole=True, **fields)


LIES: dict[str, Callable[[list[Piece]], list[Piece]]] = {
    "a bit flipped": lambda p: [flipped(p[0]), *p[1:]],
    "a bit flipped in the last byte": lambda p: [*p[:-1], flipped(p[-1], -1)],
    "nothing": lambda p: [],
    "the first piece missing": lambda p: p[1:],
    "the last piece missing": lambda p: p[:-1],
    "pieces swapped": lambda p: [p[1], p[0], *p[2:]],
    "a piece twice": lambda p: [p[0], p[0], *p[1:]],
    "a piece too many": lambda p: [*p, p[-1]],
    "another object's size": lambda p: [changed(x, object_size=x.object_size + 1) for x in p],
    "a negative size": lambda p: [changed(x, object_size=-7) for x in p],
    "another offset": lambda p: [changed(p[0], offset=p[0].offset + BLOCK_BYTES), *p[1:]],
    "an offset off the blocks": lambda p: [changed(p[0], offset=p[0].offset + 1), *p[1:]],
    "a negative offset": lambda p: [changed(p[0], offset=-BLOCK_BYTES), *p[1:]],
    "an offset beyond the end": lambda p: [changed(p[0], offset=1 << 62), *p[1:]],
    "a chunk cut short": lambda p: [signed(p[0], bytes(p[0].data)[:-1]), *p[1:]],
    "a chunk too long": lambda p: [signed(p[0], bytes(p[0].data) + b"x"), *p[1:]],
    "an empty chunk": lambda p: [signed(p[0], b""), *p[1:]],
    "no checksum": lambda p: [changed(p[0], digests=b""), *p[1:]],
    "half a checksum": lambda p: [changed(p[0], digests=p[0].digests[:4]), *p[1:]],
    "not whole after all": lambda p: [changed(p[0], whole=False), *p[1:]],
}

NO_LIES = {("pieces swapped", SMALL.size)}
"""There is one piece only."""


@pytest.mark.parametrize(
    ("lie", "size"),
    [(lie, size) for lie in LIES for size in (len(DATA), SMALL.size) if (lie, size) not in NO_LIES],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_lie_is_found_out(lie: str, size: int, known: bool) -> None:
    info = ObjectInfo(ID, size if known else UNKNOWN_SIZE)
    found = outcome(Extent(info), LIES[lie](good(0, size, DATA[:size])))
    assert isinstance(found, IntegrityError)
    assert found.object == str(ID)
    assert found.server == "server"


@given(st.data())
def test_no_shuffle_of_pieces_gives_wrong_bytes(data: st.DataObject) -> None:
    pieces = good(0, len(DATA))
    sent = data.draw(st.lists(st.sampled_from(pieces), max_size=5))
    found = outcome(Extent(ObjectInfo(ID, len(DATA))), sent)
    assert isinstance(found, IntegrityError) or bytes(found) == DATA


def test_the_servers_error_is_the_extents() -> None:
    sent = encode_error(ServerUnavailable("no way to S3", object="s3://bucket/key"))
    found = outcome(Extent(ObjectInfo(ID, 5)), [failed_piece(0, sent)])
    assert isinstance(found, ServerUnavailable)
    assert found.server == "server"
    assert found.object == "s3://bucket/key"


def test_what_came_before_the_stream_broke_is_good() -> None:
    arrivals = Arrivals([Extent(ObjectInfo(ID, len(DATA)))] * 2 + [Extent(SMALL)] * 2, [None] * 4, "server")
    pieces = good(0, len(DATA))
    (small,) = good(0, SMALL.size, DATA[: SMALL.size])
    half = pieces[0]._replace(extent=1)
    arrivals.take(encode_pieces([*pieces, half, small._replace(extent=2)]))
    broken = ServerUnavailable("broken off")
    *came, left, missing = (arrivals.outcomes(broken)[place] for place in (0, 2, 1, 3))
    assert [bytes(view) for view in came] == [DATA, DATA[: SMALL.size]]  # type: ignore[arg-type]
    assert left is missing is broken


def test_one_piece_is_not_copied() -> None:
    (piece,) = good(10, 20)
    view = outcome(Extent(ObjectInfo(ID, len(DATA)), 10, 10), [piece])
    assert isinstance(view, memoryview)
    assert pa.py_buffer(view).address == piece.data.address + 10


def test_bytes_beyond_an_object_of_unknown_size() -> None:
    found = outcome(Extent(ObjectInfo(ID, UNKNOWN_SIZE), 3, 5), good(0, 7, DATA[:7]))
    assert isinstance(found, ConfigurationError)
