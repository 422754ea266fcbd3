"""wire/: the generated code is fresh, errors survive the trip, batches carry pieces whole."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.flight as fl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache import errors
from torchcache.errors import IntegrityError, ObjectNotFound, TorchCacheError
from torchcache.model import BLOCK_BYTES, block_digests, chunk_digest
from torchcache.wire import codec, status
from torchcache.wire.status import MAX_ERROR_CHARACTERS, decode_error, encode_error

ROOT = Path(__file__).parents[2]
KINDS = [getattr(errors, name) for name in errors.__all__]


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """`make proto` was run after the last change of cache.proto."""
    out = str(tmp_path)
    flags = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *flags, "torchcache/wire/v1/cache.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("cache_pb2.py", "cache_pb2.pyi", "cache_pb2_grpc.py"):
        path = Path("torchcache/wire/v1") / name
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), (
            f"{name} is stale: run `make proto`"
        )


@pytest.mark.parametrize("character", ["k", "\u20ac", "\0", '"'])
def test_an_error_fits_the_headers_of_an_answer(character: str) -> None:
    """What is too long for gRPC would arrive as RESOURCE_EXHAUSTED, and be taken for a passing trouble."""
    long = character * 5000
    text = encode_error(ObjectNotFound(f"no {long}: check the name", object=long, server=long))
    assert len(text) <= MAX_ERROR_CHARACTERS and text.isascii()
    again = decode_error(text)
    assert type(again) is ObjectNotFound
    assert again.message.startswith("no ") and again.message.endswith(": check the name")
    assert again.object


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_the_wire_and_pickling(kind: type[TorchCacheError]) -> None:
    error = kind("what happened", object="s3://bucket/key", server="127.0.0.1:7440")
    code, text = status.status_code(error), status.encode_error(error)
    for back in (
        status.decode_error(text),
        status.error_from_status(code, text),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(back) is kind
        assert (back.message, back.object, back.server) == (error.message, error.object, error.server)
        assert "s3://bucket/key" in str(back)


def test_a_hint_when_to_come_again_survives_the_wire_and_pickling() -> None:
    busy = errors.Overloaded("busy", object="k", retry_after_s=0.25)
    text = status.encode_error(busy)
    for back in (
        status.decode_error(text),
        status.error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, text),
        pickle.loads(pickle.dumps(busy)),
        busy.saying("busy"),
    ):
        assert isinstance(back, errors.Overloaded)
        assert (back.message, back.object, back.retry_after_s) == ("busy", "k", 0.25)
    long = status.decode_error(status.encode_error(busy.saying("b" * 9000)))
    assert isinstance(long, errors.Overloaded) and long.retry_after_s == 0.25


def test_nobody_is_sent_away_without_a_hint() -> None:
    """Whoever raised it, and if gRPC itself did: by status, by Flight and as one error among others in a reply."""
    busy = errors.Overloaded("busy")
    for back in (
        status.decode_error(status.encode_error(busy)),
        status.error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, status.encode_error(busy)),
        status.error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!"),
        status.error_from_flight(fl.FlightServerError("busy", status.encode_error(busy).encode())),
    ):
        assert isinstance(back, errors.Overloaded)
        assert back.retry_after_s == status.RETRY_AFTER_S > 0
    assert busy.retry_after_s is None, "what was raised stays as it is"
    assert "retry_after_s" not in status.encode_error(errors.ServerUnavailable("away"))


def test_a_hint_of_no_time_at_all_stays_one() -> None:
    back = status.decode_error(status.encode_error(errors.Overloaded("busy", retry_after_s=0.0)))
    assert isinstance(back, errors.Overloaded) and back.retry_after_s == 0.0


def test_errors_pickle_to_and_from_versions_without_a_hint() -> None:
    make, arguments, state = errors.Overloaded("busy", server="h:1", retry_after_s=1.5).__reduce__()
    of_old = make(*arguments)  # what a version without it pickles: no state
    assert (of_old.message, of_old.server, of_old.retry_after_s) == ("busy", "h:1", None)
    at_old = errors.ServerUnavailable(
        *arguments[1:2]
    )  # what one without it makes of ours: a plain error, and the state
    at_old.__setstate__(state)
    assert str(at_old) == "busy"


def test_errors_pickle_between_versions_that_say_more_and_less() -> None:
    make, arguments = errors.NotCommitted("gone", object="k", server="h:1", request_id="r").__reduce__()
    assert callable(make) and isinstance(arguments, tuple)
    newer, older = make(*arguments, "what a newer version adds"), make(*arguments[:-1])
    assert (type(newer), str(newer)) == (errors.NotCommitted, str(make(*arguments)))
    assert (older.message, older.server, older.request_id) == ("gone", "h:1", None)


@pytest.mark.parametrize(
    ("told", "taken"),
    [("1e9", 60.0), ("3", 3.0), ("-1", None), ("NaN", None), ("true", None), ('"1"', None), ("null", None)],
)
def test_a_hint_is_believed_within_reason(told: str, taken: float | None) -> None:
    back = status.decode_error(f'{{"error": "Overloaded", "message": "m", "retry_after_s": {told}}}')
    assert isinstance(back, errors.Overloaded)
    assert back.retry_after_s == taken


def test_every_error_has_a_status() -> None:
    for kind in KINDS:
        assert status.status_code(kind("x")) is not grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.UNAUTHENTICATED, errors.ConfigurationError),
        (grpc.StatusCode.UNKNOWN, TorchCacheError),
    ],
)
def test_a_bare_status_becomes_the_first_of_its_code(code: grpc.StatusCode, kind: type) -> None:
    assert type(status.error_from_status(code, "from elsewhere", server="h:1")) is kind


@given(st.text())
def test_foreign_text_is_never_a_crash(text: str) -> None:
    assert isinstance(status.decode_error(text), TorchCacheError)


def piece(payload: bytes, extent: int = 0, *, whole: bool = True) -> codec.Piece:
    digests = chunk_digest(payload).to_bytes(8, "little") if whole else block_digests(payload)
    return codec.Piece(extent, len(payload), 0, whole, digests, pa.py_buffer(payload))


@given(st.lists(st.binary(max_size=100), max_size=20), st.integers(0, 5))
def test_pieces_survive_a_batch(payloads: list[bytes], skip: int) -> None:
    batch = codec.encode_pieces([piece(p, i) for i, p in enumerate(payloads)])
    batch.validate(full=True)
    back = list(codec.decode_pieces(batch.slice(skip)))
    assert [bytes(p.data) for p in back] == payloads[skip:]
    for p in back:
        p.verify()


def test_a_failed_piece_carries_its_error() -> None:
    text = status.encode_error(errors.ObjectNotFound("gone"))
    (back,) = codec.decode_pieces(codec.encode_pieces([codec.failed_piece(3, text)]))
    assert back.extent == 3
    assert isinstance(status.decode_error(back.error or ""), errors.ObjectNotFound)


@given(st.binary(min_size=1, max_size=3 * BLOCK_BYTES), st.booleans(), st.data())
def test_one_flipped_bit_is_found(payload: bytes, whole: bool, data: st.DataObject) -> None:
    good = piece(payload, whole=whole)
    good.verify()
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    flipped = bytearray(payload)
    flipped[bit // 8] ^= 1 << bit % 8
    bad = codec.Piece(0, good.object_size, 0, whole, good.digests, pa.py_buffer(bytes(flipped)))
    with pytest.raises(IntegrityError):
        bad.verify()


@pytest.mark.parametrize("digests", [b"", b"1234567", b"12345678" * 2])
def test_missing_or_surplus_checksums_are_refused(digests: bytes) -> None:
    for whole in (True, False):
        with pytest.raises(IntegrityError):
            codec.Piece(0, 5, 0, whole, digests, pa.py_buffer(b"hello")).verify()


def test_a_view_outside_its_buffer_is_refused() -> None:
    good = codec.binary_view_array([pa.py_buffer(b"x" * 100)])
    views = bytearray(good.buffers()[1].to_pybytes())
    views[0:4] = (200).to_bytes(4, "little")
    bad = pa.Array.from_buffers(pa.binary_view(), 1, [None, pa.py_buffer(bytes(views)), good.buffers()[2]])
    with pytest.raises(IntegrityError):
        codec.binary_view_buffers(bad)


def shortened(batch: pa.RecordBatch, column: int, place: int, length: int) -> pa.RecordBatch:
    """The batch as a lying peer's: its message says that a buffer has `length` bytes. Arrow's reader believes it."""
    buffers = [(c, i) for c, array in enumerate(batch.columns) for i, _ in enumerate(array.buffers())]
    message = bytearray(batch.serialize())
    # A flatbuffer's vector of structs: their number, then (offset, length) of each buffer in the body.
    count = struct.pack("<I", len(buffers))
    at = next(
        at + 4
        for at in range(0, len(message), 4)
        if message[at : at + 4] == count and message[at + 4 : at + 12] == bytes(8)
    )
    at += 16 * buffers.index((column, place)) + 8
    assert struct.unpack_from("<q", message, at)[0] > length
    struct.pack_into("<q", message, at, length)
    return pa.ipc.read_record_batch(pa.py_buffer(bytes(message)), batch.schema)


@pytest.mark.parametrize(
    ("column", "buffer"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 0), (5, 1), (6, 1)]
)
@pytest.mark.parametrize("kept", [0, 1])
def test_a_column_shorter_than_its_batch_is_refused(column: int, buffer: int, kept: int) -> None:
    pieces = [piece(bytes(20), i) for i in range(20)]
    batch = codec.encode_pieces([*pieces, codec.failed_piece(20, "an error")])
    with pytest.raises(IntegrityError):
        list(codec.decode_pieces(shortened(batch, column, buffer, kept)))


@pytest.mark.parametrize("column", range(4))
def test_a_column_of_a_write_shorter_than_its_batch_is_refused(column: int) -> None:
    batch = codec.encode_chunks([(0, i, chunk_digest(b"abc"), pa.py_buffer(b"abc")) for i in range(9)])
    with pytest.raises(IntegrityError):
        list(codec.decode_chunks(shortened(batch, column, 1, 1)))


def test_chunks_survive_a_batch() -> None:
    payloads = [b"", b"abc", b"x" * 70_000]
    rows = [(0, i, chunk_digest(p), pa.py_buffer(p)) for i, p in enumerate(payloads)]
    batch = codec.encode_chunks(rows)
    batch.validate(full=True)
    back = list(codec.decode_chunks(batch))
    assert [(r[0], r[1], r[2], bytes(r[3])) for r in back] == [
        (0, i, chunk_digest(p), p) for i, p in enumerate(payloads)
    ]


def test_no_batch_drags_pandas_in() -> None:
    """pa.array of a list imports it where it is installed: a quarter of a second in every server and worker."""
    program = (
        "import sys, pyarrow as pa\n"
        "from torchcache.wire.codec import *\n"
        "buffer = pa.py_buffer(b'x' * 100)\n"
        "batch = encode_pieces([Piece(0, 100, 0, True, bytes(8), buffer), failed_piece(1, 'e')])\n"
        "assert [p.error for p in decode_pieces(batch)] == [None, 'e']\n"
        "assert len(list(decode_chunks(encode_chunks([(0, 0, 2**64 - 1, buffer)])))) == 1\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
