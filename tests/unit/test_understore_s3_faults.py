"""The S3 under-store when S3 misbehaves. The server is a scripted fake: real ones can't be made to do this.

Everywhere: no wrong byte, a typed error that names the URI, every try counted.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator

import pytest
from torchcache_server.understore import s3 as understore_s3
from torchcache_server.understore import s3_upload
from torchcache_server.understore.retry import RetryPolicy
from torchcache_server.understore.s3 import S3UnderStore

from examples.seaweedfs import environment
from tests.unit.scripted_s3 import Held, Line, Request, ScriptedS3
from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    ObjectChanged,
    ObjectNotFound,
    Overloaded,
    ServerUnavailable,
    TransientError,
)
from torchcache.model import ByteRange, ObjectId, ObjectInfo

DATA = bytes(range(256)) * 4096
WHOLE = ByteRange(0, len(DATA))
PART = ByteRange(1000, len(DATA) - 1000)
KEYS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "canary-secret"}
QUICK = RetryPolicy(tries=4, first_s=0.001, first_overloaded_s=0.001)


@pytest.fixture
def fake() -> Iterator[ScriptedS3]:
    with (
        ScriptedS3() as server,
        environment({"AWS_ENDPOINT_URL": server.endpoint_url, "AWS_REGION": "us-east-1"}),
    ):
        server.objects["bucket/key"] = Held(DATA)
        yield server


@pytest.fixture(params=["by botocore", "plain"])
def s3(fake: ScriptedS3, request: pytest.FixtureRequest) -> Iterator[S3UnderStore]:
    """With "plain" a read has shown already how the bucket is reached, so that the next goes without botocore."""
    under_store = S3UnderStore("s3", "s3://bucket", credentials=KEYS, policy=QUICK)
    if request.param == "plain":
        for timeout_s in (30.0, 7.0):  # a client for each patience
            while not comes(under_store, timeout_s):
                pass
        fake.requests.clear()
        fake.ranges.clear()
        under_store.counters.read_requests = under_store.counters.read_bytes = 0
    yield under_store
    under_store.close()
    counters = under_store.counters
    counted = counters.read_requests + counters.write_requests + counters.meta_requests
    until = time.monotonic() + 60  # for those that were given up before they were read
    while len(fake.requests) < counted and time.monotonic() < until:
        time.sleep(0.01)
    assert counted == len(fake.requests)


def read(s3: S3UnderStore, range: ByteRange, *, timeout_s: float = 30.0) -> bytes:
    info = ObjectInfo(ObjectId("s3", "key", Held(DATA).etag.strip('"')), len(DATA))
    return bytes(s3.read(info, range, deadline=time.monotonic() + timeout_s))


def comes(s3: S3UnderStore, timeout_s: float) -> bool:
    """Reads, where nothing is wrong; False if the machine had no time for it."""
    try:
        return read(s3, WHOLE, timeout_s=timeout_s) == DATA
    except DeadlineExceeded:
        return False


def write(s3: S3UnderStore, data: bytes, *, replaces: str | None = "", timeout_s: float = 30.0) -> ObjectInfo:
    deadline = time.monotonic() + timeout_s
    return s3.write("new", iter([memoryview(data)]), len(data), replaces=replaces, deadline=deadline)


def rightly(request: Request) -> bool:
    return False


def refusal(status: int, code: str) -> Line:
    def line(request: Request) -> bool:
        request.refuse(status, code)
        return True

    return line


def broken_off_after(count: int) -> Line:
    """The right headers, `count` bytes, then a RST (F18)."""

    def line(request: Request) -> bool:
        first = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        held = request.server.owner.objects[request.key]
        request.send_object(held, body=held.data[first : first + count], then=request.reset)
        return True

    return line


def stalled(request: Request) -> bool:
    request.stall()
    return True


def stalled_amid(request: Request) -> bool:
    request.send_object(Held(DATA), body=DATA[:70_000], then=request.stall)
    return True


def short(request: Request) -> bool:
    """A whole answer, but of fewer bytes than there are (F25)."""
    request.send_object(Held(DATA[:-2000]), headers={"ETag": Held(DATA).etag})
    return True


def flipped(request: Request) -> bool:
    """A byte is wrong, the checksum isn't."""
    request.send_object(Held(DATA), body=b"\xff" + DATA[1:])
    return True


def elsewhere(request: Request) -> bool:
    """Another range than the one asked for."""
    first, last = PART.start + 1, PART.end
    headers = {"Content-Range": f"bytes {first}-{last}/{len(DATA)}"}
    request.send_object(Held(DATA), body=DATA[first : last + 1], headers=headers)
    return True


def unranged(request: Request) -> bool:
    """The beginning of the object, as long as the range."""
    body = DATA[: PART.length]
    request.reply(200, body, headers={"ETag": Held(DATA).etag})
    return True


@pytest.mark.parametrize("range", [WHOLE, PART])
@pytest.mark.parametrize(
    "line",
    [
        refusal(503, "SlowDown"),
        refusal(500, "InternalError"),
        short,
        broken_off_after(0),
        broken_off_after(99),
    ],
)
def test_a_passing_fault_is_retried(s3: S3UnderStore, fake: ScriptedS3, line: Line, range: ByteRange) -> None:
    """F23, F25."""
    fake.script = [line, line]
    assert read(s3, range) == DATA[range.start : range.end]
    assert s3.counters.read_requests == 3
    assert s3.counters.retries == 2


@pytest.mark.parametrize(
    ("line", "range", "kind"),
    [
        (refusal(503, "SlowDown"), PART, Overloaded),
        (refusal(429, "TooManyRequests"), PART, Overloaded),
        (refusal(500, "InternalError"), PART, ServerUnavailable),
        (broken_off_after(0), PART, ServerUnavailable),
        (short, WHOLE, IntegrityError),
        (flipped, WHOLE, IntegrityError),
        (elsewhere, PART, IntegrityError),
        (unranged, PART, IntegrityError),
    ],
)
def test_a_lasting_fault_is_told(
    s3: S3UnderStore, fake: ScriptedS3, line: Line, range: ByteRange, kind: type[Exception]
) -> None:
    """F23, F25."""
    fake.always = line
    with pytest.raises(kind, match=r"s3://bucket/key.*4 tries failed"):
        read(s3, range)
    assert s3.counters.read_requests == 4


def test_a_range_that_breaks_off_goes_on_where_it_stopped(s3: S3UnderStore, fake: ScriptedS3) -> None:
    """F18. The kernel may lose what it held back before the RST, so where exactly is its affair."""
    fake.script = [broken_off_after(500_000)] * 3
    assert read(s3, PART) == DATA[PART.start : PART.end]
    starts = [int((asked or "").removeprefix("bytes=").partition("-")[0]) for asked in fake.ranges]
    assert starts == sorted(starts)
    assert starts[-1] > PART.start


def test_a_whole_object_that_breaks_off_starts_again(s3: S3UnderStore, fake: ScriptedS3) -> None:
    fake.script = [broken_off_after(500_000)] * 3
    assert read(s3, WHOLE) == DATA
    assert fake.ranges == [None] * 4


@pytest.mark.parametrize("line", [stalled, stalled_amid])
def test_a_stall_is_waited_out_on_another_connection(s3: S3UnderStore, fake: ScriptedS3, line: Line) -> None:
    """F24."""
    fake.script = [line]
    assert read(s3, WHOLE, timeout_s=7.0) == DATA
    assert s3.counters.read_requests >= 2


@pytest.mark.parametrize("line", [stalled, stalled_amid])
def test_a_lasting_stall_ends_by_the_deadline(s3: S3UnderStore, fake: ScriptedS3, line: Line) -> None:
    """F24."""
    fake.always = line
    with pytest.raises(DeadlineExceeded, match=r"deadline for s3://bucket/key passed after \d failed tries"):
        read(s3, WHOLE, timeout_s=3.0)


def test_a_deadline_that_has_passed_asks_nothing(s3: S3UnderStore, fake: ScriptedS3) -> None:
    with pytest.raises(DeadlineExceeded, match="s3://bucket/key passed before it could be asked for"):
        read(s3, WHOLE, timeout_s=-1.0)
    assert fake.requests == []


def test_a_server_blind_to_conditions_can_not_mix_versions(s3: S3UnderStore, fake: ScriptedS3) -> None:
    """F26: the object is swapped between two tries, and If-Match isn't heeded."""
    other = Held(DATA[::-1])

    def blind(request: Request) -> bool:
        fake.objects["bucket/key"] = other
        request.send_object(other)
        return True

    fake.script = [broken_off_after(300_000), blind]
    with pytest.raises(ObjectChanged, match="s3://bucket/key was overwritten"):
        read(s3, PART)


def test_a_change_that_is_none_is_worth_another_try(s3: S3UnderStore, fake: ScriptedS3) -> None:
    """F26: a server that can't look says 412 as well."""
    fake.script = [refusal(412, "PreconditionFailed")]
    with pytest.raises(ServerUnavailable, match="s3://bucket/key was said to have changed, and has not"):
        read(s3, PART)
    assert read(s3, PART) == DATA[PART.start : PART.end]


def test_what_is_gone_is_said_to_be_gone_whatever_was_answered(s3: S3UnderStore, fake: ScriptedS3) -> None:
    def gone(request: Request) -> bool:
        del fake.objects["bucket/key"]
        return refusal(412, "PreconditionFailed")(request)

    fake.script = [gone]
    with pytest.raises(ObjectNotFound, match="s3://bucket/key is gone from the under-store"):
        read(s3, PART)


@pytest.mark.parametrize("call", ["read", "read a part", "stat", "write"])
def test_a_head_that_was_cut_off_is_no_answer(s3: S3UnderStore, fake: ScriptedS3, call: str) -> None:
    """F18, F25: wherever it was cut. Without its ETag an object would seem to have changed."""
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read(s3, WHOLE),
        "read a part": lambda: read(s3, PART),
        "stat": lambda: s3.stat("key", deadline=time.monotonic() + 30),
        "write": lambda: s3.write(
            "other", iter([b"bytes"]), 5, replaces=None, deadline=time.monotonic() + 30
        ),
    }
    right = calls[call]()
    ended: list[int] = []

    def cut(at: int) -> Line:
        def line(request: Request) -> bool:
            whole, request.wfile = request.wfile, io.BytesIO()
            request.serve()
            answer = request.wfile.getvalue()
            head = answer[: answer.index(b"\r\n\r\n") + 4]
            if at >= len(head) - 1:
                ended.append(at)
                whole.write(answer)
            else:
                whole.write(head[:at])
                request.close_connection = True
            whole.flush()
            request.wfile = whole
            return True

        return line

    at = 0
    while not ended:
        fake.script = [cut(at)]
        if call == "write":
            fake.objects.pop("bucket/other", None)
        assert calls[call]() == right, at
        at += 1
    assert at > 60


def test_a_swap_amid_a_read_is_noticed(s3: S3UnderStore, fake: ScriptedS3) -> None:
    """F26."""

    def swap(request: Request) -> bool:
        held, fake.objects["bucket/key"] = fake.objects["bucket/key"], Held(DATA[::-1])
        request.send_object(held, body=held.data[PART.start :][:300_000], then=request.reset)
        return True

    fake.script = [swap]
    with pytest.raises(ObjectChanged, match="s3://bucket/key was overwritten"):
        read(s3, PART)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(s3: S3UnderStore, fake: ScriptedS3, status: int) -> None:
    with ScriptedS3() as other:
        other.objects["bucket/key"] = Held(DATA)

        def redirect(request: Request) -> bool:
            request.refuse(status, "Moved", headers={"Location": f"{other.endpoint_url}/bucket/key"})
            return True

        fake.always = redirect
        with pytest.raises(ConfigurationError, match=r"elsewhere, which is not followed; set AWS_REGION"):
            read(s3, WHOLE)
        assert other.requests == []


def test_an_outage_is_not_met_by_a_storm_of_retries(s3: S3UnderStore, fake: ScriptedS3) -> None:
    fake.always = refusal(500, "InternalError")
    for _ in range(120):
        with pytest.raises(ServerUnavailable):
            read(s3, WHOLE)
    assert s3.counters.retries == 256  # The budget; 360 had it not been for it.


def lost(request: Request) -> bool:
    """The request is carried out, the answer never comes."""
    request.wfile = io.BytesIO()
    request.serve()
    request.connection.close()
    request.close_connection = True
    return True


@pytest.mark.parametrize("replaces", ["", None])
@pytest.mark.parametrize("size", [10, 9_000_000])
def test_a_write_whose_answer_is_lost_recognises_itself(
    s3: S3UnderStore, fake: ScriptedS3, size: int, replaces: str | None
) -> None:
    """F27, F30."""
    first = [] if size == 10 else [rightly] * 3
    fake.script = [*first, lost]
    data = bytes(size)
    info = write(s3, data, replaces=replaces)
    assert info == s3.stat("new", deadline=time.monotonic() + 30)
    assert fake.objects["bucket/new"].data == data


@pytest.mark.parametrize("size", [10, 9_000_000])
def test_a_write_whose_answers_are_all_lost_looks_in_the_end(
    s3: S3UnderStore, fake: ScriptedS3, size: int
) -> None:
    first = [] if size == 10 else [rightly] * 3
    # After the loss: three times a try and a look. The last look is answered.
    fake.script = [*first, lost, *[refusal(500, "InternalError")] * 6]
    data = bytes(size)
    assert write(s3, data).size == size
    assert fake.objects["bucket/new"].data == data


def test_a_write_whose_answer_is_lost_does_not_take_another_s_for_its_own(
    s3: S3UnderStore, fake: ScriptedS3
) -> None:
    def beaten(request: Request) -> bool:
        fake.objects["bucket/new"] = Held(b"another")
        request.reset()
        return True

    fake.script = [beaten]
    with pytest.raises(AlreadyExists, match="s3://bucket/new exists already"):
        write(s3, b"mine")
    assert fake.objects["bucket/new"].data == b"another"


def test_a_failed_upload_leaves_no_parts(s3: S3UnderStore, fake: ScriptedS3) -> None:
    def fail_parts(request: Request) -> bool:
        if "partNumber" not in request.path:
            return False
        request.refuse(500, "InternalError")
        return True

    fake.always = fail_parts
    with pytest.raises(TransientError, match="s3://bucket/new"):
        write(s3, bytes(9_000_000))
    assert fake.pending == {}
    assert "bucket/new" not in fake.objects


def copied(s3: S3UnderStore, source: Held) -> ObjectInfo | None:
    info = ObjectInfo(ObjectId("s3", "key", source.etag.strip('"')), len(source.data))
    return s3.copy(info, "new", replaces="", deadline=time.monotonic() + 30)


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "COPIED_PART_BYTES", 5_000_000)


def test_a_large_object_is_copied_in_parts(s3: S3UnderStore, fake: ScriptedS3, small_copies: None) -> None:
    source = fake.objects["bucket/key"] = Held(bytes(range(256)) * 40_000)
    info = copied(s3, source)
    assert info is not None
    assert info.size == len(source.data)
    assert fake.objects["bucket/new"].data == source.data
    assert fake.objects["bucket/new"].part_sizes == [5_000_000, 5_000_000, 240_000]


COPY_FAULTS: dict[str, Callable[[Request], None]] = {
    "it fails": lambda request: request.refuse(500, "InternalError"),
    "it isn't allowed": lambda request: request.refuse(403, "AccessDenied"),
    "it isn't known": lambda request: request.refuse(501, "NotImplemented"),
    "it takes no notice of the range": lambda request: request.copy_part(whole=True),
    "it takes no notice of the version": lambda request: request.copy_part(any_version=True),
}


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_what_is_not_copied_for_sure_is_left_to_be_written(
    s3: S3UnderStore, fake: ScriptedS3, small_copies: None, fault: str
) -> None:
    """Whatever the server makes of the parts: nothing appears at the key, and no parts stay."""
    source = Held(bytes(range(256)) * 40_000)
    fake.objects["bucket/key"] = Held(bytes(10_240_000)) if fault.endswith("version") else source

    def wrongly(request: Request) -> bool:
        if "x-amz-copy-source" not in request.headers:
            return False
        COPY_FAULTS[fault](request)
        return True

    fake.always = wrongly
    assert copied(s3, source) is None
    assert fake.pending == {}
    assert "bucket/new" not in fake.objects


@pytest.mark.parametrize("slow", [False, True])
def test_a_server_that_fails_to_copy_holds_nobody_up(
    s3: S3UnderStore, fake: ScriptedS3, small_copies: None, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """A second try, and the bytes are sent; of one that was slow about it copies aren't wanted again so soon."""
    monkeypatch.setattr(understore_s3, "SLOW_REFUSAL_S", 0.0 if slow else 1e6)
    source = fake.objects["bucket/key"] = Held(bytes(range(256)) * 40_000)
    failing = True
    asked = 0

    def fail(request: Request) -> bool:
        nonlocal asked
        asked += "x-amz-copy-source" in request.headers
        if not failing or "x-amz-copy-source" not in request.headers:
            return False
        request.refuse(503, "SlowDown")
        return True

    fake.always = fail
    assert copied(s3, source) is None
    assert asked == 2
    failing = False
    if slow:
        assert copied(s3, source) is None
        assert asked == 2
        s3._copies_from_s = time.monotonic()  # so much later
    assert copied(s3, source) is not None
    assert fake.objects["bucket/new"].data == source.data


def test_an_error_inside_a_200_is_one(s3: S3UnderStore, fake: ScriptedS3) -> None:
    """CompleteMultipartUpload may fail after its status went out."""

    def late(request: Request) -> bool:
        request.refuse(200, "InternalError")
        return True

    fake.script = [rightly, rightly, rightly, late]
    assert write(s3, bytes(9_000_000)).size == 9_000_000
    assert fake.objects["bucket/new"].data == bytes(9_000_000)


def test_a_server_without_conditions_is_refused(s3: S3UnderStore, fake: ScriptedS3) -> None:
    fake.always = refusal(501, "NotImplemented")
    with pytest.raises(ConfigurationError, match="must know conditional requests"):
        write(s3, b"data")
    assert len(fake.requests) == 1


def test_no_error_tells_a_secret(s3: S3UnderStore, fake: ScriptedS3) -> None:
    fake.always = refusal(403, "SignatureDoesNotMatch")
    with pytest.raises(ConfigurationError, match="secret key is wrong") as caught:
        read(s3, WHOLE)
    assert "canary-secret" not in f"{caught.value!r} {s3!r} {vars(s3)}"


def test_slow_down_of_listing_and_stat_is_retried_and_counted(s3: S3UnderStore, fake: ScriptedS3) -> None:
    fake.script = [refusal(503, "SlowDown")]
    assert s3.stat("key", deadline=time.monotonic() + 30).size == len(DATA)
    assert (s3.counters.meta_requests, s3.counters.retries) == (2, 1)
