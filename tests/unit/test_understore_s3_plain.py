"""GETs without botocore: the same signature, the same bytes, and only where botocore's own request was as simple."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.understore.s3 import S3UnderStore
from torchcache_server.understore.s3_plain import PlainGets, Way
from torchcache_server.understore.s3_signing import Keys, Scope, escaped, signed

from examples.seaweedfs import SeaweedFS
from tests.unit.scripted_s3 import Request, ScriptedS3
from torchcache.model import ByteRange

NOW = datetime(2026, 11, 29, 18, 30, 1, tzinfo=UTC)
URL = "https://bucket.s3.eu-central-1.amazonaws.com"


@given(
    key=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30),
    token=st.sampled_from(["", "session"]),
)
def test_it_signs_as_botocore_does(key: str, token: str) -> None:
    headers = {"host": "bucket.s3.eu-central-1.amazonaws.com", "range": "bytes=0-9", "if-match": '"v"'}
    path = "/" + escaped(key)
    sent = signed(path, headers, Keys("AK", "secret", token), Scope("eu-central-1", "s3"), NOW)
    request = AWSRequest("GET", URL + path, headers=dict(sent))
    del request.headers["authorization"]
    auth = S3SigV4Auth(Credentials("AK", "secret", token or None), "s3", "eu-central-1")
    request.context["timestamp"] = sent["x-amz-date"]
    canonical = auth.canonical_request(request)
    expected = auth.signature(auth.string_to_sign(request, canonical), request)
    assert sent["authorization"].rpartition("Signature=")[2] == expected


def model(**changes: Any) -> Way | None:
    """The way that a request of botocore's shows, changed so."""
    request = {
        "url": f"{URL}/some/key%20x",
        "key": "some/key x",
        "Authorization": b"AWS4-HMAC-SHA256 Credential=AK/20261129/eu-central-1/s3/aws4_request, SignedHeaders=host",
        "X-Amz-Date": b"20261129T183001Z",
        **changes,
    }
    url, key = request.pop("url"), request.pop("key")
    return Way.of(url, {name: value for name, value in request.items() if value is not None}, key)


def test_a_simple_request_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    way = model()
    assert way is not None
    assert (way.scheme, way.before_key, way.scope) == ("https", "/", Scope("eu-central-1", "s3"))
    path_style = model(url="http://127.0.0.1:8333/bucket/some/key%20x")
    assert path_style is not None
    assert (path_style.netloc, path_style.before_key) == ("127.0.0.1:8333", "/bucket/")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert model() is None


@pytest.mark.parametrize(
    "change",
    [
        {"Authorization": None},
        {
            "Authorization": b"AWS4-ECDSA-P256-SHA256 Credential=AK/20261129/s3/aws4_request, SignedHeaders=host"
        },
        {"x-amz-s3session-token": b"express"},
        {"url": f"{URL}/some/key%20x?versionId=7"},
        {"url": f"{URL}/another"},
    ],
)
def test_any_other_is_none(change: dict[str, Any]) -> None:
    assert model(**change) is None


@dataclass
class Idle:
    """A connection that nobody uses."""

    is_spoiled: bool = False
    closed: bool = False

    def close(self) -> None:
        self.closed = True


def test_what_the_server_has_closed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst leaves as many connections as it needed at once; a trickle behind it uses one of them."""
    monkeypatch.setattr("torchcache_server.understore.s3_plain.LOOK_S", 0.0)
    gets: Any = PlainGets(lambda: None, None, 1.0, 1.0)  # any, for it is given connections that are none
    way = model()
    burst = [Idle() for _ in range(4)]
    for one in burst:
        gets._keep(way, one)
    assert not any(one.closed for one in burst)
    for one in burst[:3]:
        one.is_spoiled = True
    assert gets._connection(way) is burst[3]
    gets._keep(way, burst[3])
    assert [one.closed for one in burst] == [True, True, True, False]
    burst[3].is_spoiled = True
    gets._keep(way, last := Idle(is_spoiled=True))
    assert burst[3].closed
    assert last.closed
    gets.close()
    gets._keep(way, late := Idle())
    assert late.closed


def test_what_is_idle_is_not_looked_at_with_every_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache_server.understore.s3_plain.LOOK_S", 1e9)
    gets: Any = PlainGets(lambda: None, None, 1.0, 1.0)  # any, for it is given connections that are none
    way = model()
    gets._keep(way, Idle())
    gets._keep(way, closed := Idle(is_spoiled=True))
    assert not closed.closed
    gets._keep(way, good := Idle())
    assert gets._connection(way) is good
    gets._idle[way.scheme, way.netloc].popleft()
    monkeypatch.setattr(gets, "_connected", lambda way: "a new one")
    assert gets._connection(way) == "a new one"
    assert closed.closed  # a connection is looked at before it is used, whatever the time


@pytest.fixture
def under_store(s3: SeaweedFS) -> Iterator[S3UnderStore]:
    under_store = S3UnderStore("s3", "s3://")
    yield under_store
    under_store.close()


@pytest.mark.parametrize("key", ["plain", "with space/ünd, so+on=&~!'()*", "a//b", "%41"])
def test_a_real_server_takes_the_signature(s3: SeaweedFS, under_store: S3UnderStore, key: str) -> None:
    bucket, data = s3.make_bucket(), bytes(range(256)) * 999
    s3.client.put_object(Bucket=bucket, Key=key, Body=data)
    info = under_store.stat(f"{bucket}/{key}", deadline=time.monotonic() + 30)
    for start, end in ((0, len(data)), (100, 70_000), (0, len(data)), (7, 9)):
        read = under_store.read(info, ByteRange(start, end), deadline=time.monotonic() + 30)
        assert read == data[start:end]
    assert under_store._calls.clients.plain(under_store._calls.clients.get(time.monotonic() + 30)).way(bucket)


def test_a_connection_that_ends_before_the_answer_is_an_error_without_a_ring_of_causes() -> None:
    def hang_up(request: Request) -> bool:
        request.close_connection = True
        return True

    with ScriptedS3() as s3:
        s3.always = hang_up
        way = Way("http", s3.endpoint_url.removeprefix("http://"), "/", Scope("us-east-1", "s3"), "agent")
        gets = PlainGets(lambda: Keys("AK", "secret", ""), None, 5.0, 5.0)
        with pytest.raises(OSError, match="within an answer's head") as raised:
            gets.get(way, "bucket/key", {})
        assert raised.value.__cause__ is not raised.value
        gets.close()
