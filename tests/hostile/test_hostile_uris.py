"""URIs and buckets by which a client would have the server call elsewhere, and redirects by which a storage would."""

from __future__ import annotations

from functools import partial
from urllib.parse import unquote, urlsplit

import pytest

from tests.hostile.hostile_server import SECRET, HostileServer, outcome, refusal
from tests.unit.scripted_s3 import Held, Line, Request
from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.wire.v1 import cache_pb2 as pb

STORES = (
    "http://169.254.169.254/",
    "http://127.0.0.1:{trap}/",
    "https://127.0.0.1:{trap}/",
    "http://2130706433:{trap}/",
    "http://0x7f000001:{trap}/",
    "http://0177.0.0.1:{trap}/",
    "http://[::ffff:127.0.0.1]:{trap}/",
    "http://[64:ff9b::7f00:1]:{trap}/",
    "http://localhost:{trap}/",
    "http://s3@127.0.0.1:{trap}/",
    "ftp://127.0.0.1:{trap}/",
    "gopher://127.0.0.1:{trap}/",
    "file:///etc",
    "file://{folder}/outside",
    "s3://bucket",
    "s3://127.0.0.1:{trap}",
    "127.0.0.1:{trap}",
    "S3",
    "s3 ",
    "s3\0",
    "../s3",
    "samples/..",
)
"""Given where the name of an under-store belongs."""

BUCKETS = (
    "127.0.0.1:{trap}/key",
    "user@127.0.0.1/key",
    "user:password@127.0.0.1:{trap}/key",
    "/127.0.0.1:{trap}/key",
    "//127.0.0.1:{trap}/key",
    "http://127.0.0.1:{trap}/key",
    "[::1]:{trap}/key",
    "arn:aws:s3:us-east-1:123456789012:accesspoint/x/key",
    "arn:aws:s3-outposts:us-east-1:123456789012:outpost/o/accesspoint/x/key",
    "../admin/key",
    "..",
    "bucket",
    "bucket/",
    "bucket/../other/key",
    "bucket/./key",
    "bucket/a/..",
    "bucket\\@127.0.0.1/key",
    "bucket?x=/key",
    "bucket#x/key",
    "bu cket/key",
    "bu\ncket/key",
    "bu\r\nHost: x\r\n/key",
    "bucket\0/key",
    "b\u00fccket/key",
    "%62ucket/key",
    "-bucket/key",
    "ab/key",
    "{long}/key",
)
"""Keys of an under-store s3://, which begin with a bucket: none of these names one."""

KEYS = (
    "169.254.169.254/latest/meta-data",
    "bucket/%2e%2e/other",
    "bucket/..%2f..%2fother",
    "bucket/key?versionId=other",
    "bucket/key#fragment",
    "bucket/a&b=c",
    "bucket/a+b c",
    "bucket/a\r\nHost: 127.0.0.1:{trap}",
    "bucket//double",
    "bucket/\u202e\u20ac",
    "bucket/http://127.0.0.1:{trap}/",
    "bucket/;x=y,z",
)
"""Keys that are an object's, however odd: just they are asked for, where the server was told to ask."""


def filled(server: HostileServer, text: str) -> str:
    return text.format(trap=server.trap.port, folder=server.folder, long="l" * 300)


@pytest.mark.hostile("uris")
@pytest.mark.parametrize("store", STORES)
def test_a_uri_is_no_under_store(server: HostileServer, store: str) -> None:
    name = filled(server, store)
    asked = len(server.s3.requests)
    ref = pb.ObjectRef(store=name, key="latest/meta-data", version="1", size=100)
    save = pb.SaveRef(store=name, path="run", save_id="1")
    for call, request in (
        ("StatObject", pb.StatRequest(store=name, key="latest/meta-data")),
        ("ListObjects", pb.ListRequest(store=name, prefix="")),
        ("ListFolder", pb.ListFolderRequest(store=name, prefix="a/")),
        ("DeleteObject", pb.DeleteRequest(store=name, key="k")),
        ("ReserveSave", pb.ReserveSaveRequest(save=save, writer="w")),
        ("GetSave", pb.GetSaveRequest(store=name, path="run", check_claim=True)),
        ("ListSaves", pb.ListSavesRequest(store=name, prefix="")),
        ("PublishObject", pb.PublishRequest(store=name, key="k", write_id="1", size=1)),
    ):
        error = refusal(partial(server.client.call, call, request))
        assert isinstance(error, ConfigurationError), call
    (got,) = server.client.read([ref])
    assert "has no under-store" in str(got)
    (staged,) = server.client.call("Stage", pb.StageRequest(namespace="n", objects=[ref])).errors
    assert "has no under-store" in staged
    assert SECRET.decode() not in str(got) + staged
    assert len(server.s3.requests) == asked


@pytest.mark.hostile("uris")
@pytest.mark.parametrize("key", BUCKETS)
def test_what_is_no_bucket_is_not_asked_for(server: HostileServer, key: str) -> None:
    name = filled(server, key)
    asked = len(server.s3.requests)
    error = refusal(lambda: server.client.call("StatObject", pb.StatRequest(store="s3", key=name)))
    assert isinstance(error, ConfigurationError)
    ref = pb.ObjectRef(store="s3", key=name, version="1", size=100)
    (got,) = server.client.read([ref])
    assert "ConfigurationError" in str(got)
    assert len(server.s3.requests) == asked


@pytest.mark.hostile("uris")
@pytest.mark.parametrize("key", KEYS)
def test_an_odd_key_is_asked_for_and_nothing_else(server: HostileServer, key: str) -> None:
    name = filled(server, key)
    server.s3.objects[name] = Held(b"x" * 100)
    asked = len(server.s3.requests)
    found = server.client.call("StatObject", pb.StatRequest(store="s3", key=name))
    for _ in range(2):  # first as botocore asks, then without it
        assert server.client.read([found]) == [b"x" * 100]
        server.client.call("Evict", pb.EvictRequest(namespace="n"))
    del server.s3.objects[name]
    requests = server.s3.requests[asked:]
    assert len(requests) == 3
    for request in requests:
        path = urlsplit(request.partition(" ")[2])
        assert unquote(path.path) == f"/{name}"
        assert not path.query


def redirect(status: int, **headers: str) -> Line:
    def line(request: Request) -> bool:
        request.refuse(status, "PermanentRedirect", headers=headers)
        return True

    return line


REDIRECTS = {
    **{
        f"{status} to {scheme}": (status, scheme)
        for status in (301, 302, 303, 307, 308)
        for scheme in ("http", "//")
    },
    "300 to http": (300, "http"),
    "304 to http": (304, "http"),
    "a refusal with a place": (403, "http"),
    "an error with a place": (400, "http"),
}


@pytest.mark.hostile("uris")
@pytest.mark.parametrize("call", ["stat", "list", "read"])
@pytest.mark.parametrize("name", REDIRECTS)
def test_a_redirect_is_not_followed(server: HostileServer, name: str, call: str) -> None:
    """Neither by its Location, nor by a region that would become a part of a host's name."""
    status, scheme = REDIRECTS[name]
    place = f"{'http:' if scheme == 'http' else ''}//127.0.0.1:{server.trap.port}/bucket/key"
    region = {"x-amz-bucket-region": f"x@127.0.0.1:{server.trap.port}/#"}
    server.s3.always = redirect(status, Location=place, **region)
    ref = pb.ObjectRef(store="s3", key="bucket/key", version="1", size=100)
    if call == "read":
        (got,) = server.client.read([ref], timeout_s=5)
        assert '"error"' in str(got)
        return
    request = ("StatObject", pb.StatRequest(store="s3", key="bucket/key"))
    if call == "list":
        request = ("ListObjects", pb.ListRequest(store="s3", prefix="bucket/"))
    assert isinstance(outcome(lambda: server.client.call(*request, timeout_s=5)), TorchCacheError)
