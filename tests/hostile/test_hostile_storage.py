"""A storage that lies: pages of listings, answers to HEAD and GET that make no sense, or would take the memory."""

from __future__ import annotations

import gzip

import pytest

from tests.hostile.hostile_server import HostileServer, outcome
from tests.unit.scripted_s3 import Line, Request
from torchcache.errors import TorchCacheError
from torchcache.wire.v1 import cache_pb2 as pb

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
SECRET_ENTITY = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
LAUGHS = (
    "<!DOCTYPE x ["
    + '<!ENTITY a0 "lol">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    + "]>"
)


def page(content: str, *, more: str = "<IsTruncated>false</IsTruncated>", before: str = "") -> bytes:
    return f"{before}<ListBucketResult {NAMESPACE}>{content}{more}</ListBucketResult>".encode()


def entry(key: str = "folder/a", *, etag: str = '"e"', size: object = 5, more: str = "") -> str:
    return f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size>{more}</Contents>"


TRUNCATED = "<IsTruncated>true</IsTruncated>"

PAGES: dict[str, bytes] = {
    "nothing": b"",
    "no XML": b"hello",
    "half of it": page(entry())[:120],
    "another document": b"<html><body>welcome</body></html>",
    "JSON": b'{"Contents": []}',
    "NULs": bytes(1000),
    "no UTF-8": page(entry()).replace(b"folder/a", b"folder/\xff\xfe"),
    "an unknown encoding": b'<?xml version="1.0" encoding="cheese"?>' + page(entry()),
    "UTF-16": page(entry()).decode().encode("utf-16"),
    "no key": page('<Contents><ETag>"e"</ETag><Size>5</Size></Contents>'),
    "no ETag": page("<Contents><Key>folder/a</Key><Size>5</Size></Contents>"),
    "no size": page('<Contents><Key>folder/a</Key><ETag>"e"</ETag></Contents>'),
    "an empty entry": page("<Contents/>"),
    "a size that is none": page(entry(size="many")),
    "a negative size": page(entry(size=-5)),
    "a size beyond 64 bits": page(entry(size=1 << 70)),
    "a size with a point": page(entry(size="5.5")),
    "an ETag that is empty": page(entry(etag="")),
    "a very long ETag": page(entry(etag="e" * 100_000)),
    "a very long key": page(entry("folder/" + "k" * 100_000)),
    "an empty key": page(entry("")),
    "a key that leads up": page(entry("folder/../../secret")),
    "a key of another folder": page(entry("elsewhere/a")),
    "more, but not where": page(entry(), more=TRUNCATED),
    "more, and whether makes no sense": page(entry(), more="<IsTruncated>perhaps</IsTruncated>"),
    "whether there is more is missing": page(entry(), more=""),
    "a folder without a name": page("<CommonPrefixes></CommonPrefixes>"),
    "an entity of a file": page(entry("&e;"), before=SECRET_ENTITY),
    "a billion laughs": page(entry("&a11;"), before=LAUGHS),
    "deep": page("<Contents>" * 50_000),
    "ten thousand attributes": page("<Contents " + " ".join(f"a{n}='x'" for n in range(10_000)) + "/>"),
    "a message too large": page("".join(entry(f"folder/{'k' * 900}{n:09}") for n in range(6000))),
}
"""Bodies of a listing, with 200."""


def answered(body: bytes, **headers: str) -> Line:
    def line(request: Request) -> bool:
        request.reply(200, body, headers=headers)
        return True

    return line


UNREADABLE = {
    "no XML",
    "half of it",
    "JSON",
    "NULs",
    "no UTF-8",
    "a billion laughs",
    "deep",
}
"""Tried again for a while, as if it had been damaged on the way: once is enough here."""

PATIENCE_S = 1.0


@pytest.mark.hostile("pages")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        (name, call)
        for name in PAGES
        for call in ("ListObjects", "ListFolder")
        if call == "ListObjects" or name not in UNREADABLE
    ],
)
def test_a_page_that_lies_is_an_error_or_no_harm(server: HostileServer, name: str, call: str) -> None:
    """Whatever comes back is of the form that every client relies on, and passes the server's own bounds."""
    server.s3.always = answered(PAGES[name])
    kind = pb.ListRequest if call == "ListObjects" else pb.ListFolderRequest
    request = kind(store="s3", prefix="bucket/folder/")
    reply = outcome(lambda: server.client.call(call, request, timeout_s=PATIENCE_S))
    if isinstance(reply, TorchCacheError):
        assert "root:" not in str(reply)
        return
    assert name not in UNREADABLE
    for ref in reply.objects:
        assert ref.key.startswith("bucket/folder/"), "of another folder than was asked for"
        assert ref.version and 0 <= ref.size < 1 << 50
        assert "root:" not in ref.key


def head(status: int = 200, *, body: bytes = b"", **headers: str) -> Line:
    def line(request: Request) -> bool:
        request.reply(status, body, headers=headers)
        return True

    return line


HEADS: dict[str, Line] = {
    "no ETag": head(**{"Content-Length": "100"}),
    "an empty ETag": head(ETag="", **{"Content-Length": "100"}),
    "a length that is none": head(ETag='"e"', **{"Content-Length": "many"}),
    "a negative length": head(ETag='"e"', **{"Content-Length": "-5"}),
    "a length beyond 64 bits": head(ETag='"e"', **{"Content-Length": str(1 << 70)}),
    "an exabyte": head(ETag='"e"', **{"Content-Length": str(1 << 60)}),
    "a very long ETag": head(ETag=f'"{"e" * 10_000}"', **{"Content-Length": "5"}),
    "a status that is none": head(799),
    "no content": head(204),
    "many headers": head(ETag='"e"', **{f"X-{n}": "x" for n in range(200)}),
    "a time that is none": head(ETag='"e"', **{"Last-Modified": "yesterday", "Content-Length": "5"}),
}


@pytest.mark.hostile("pages")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_lies_is_an_error_or_no_harm(server: HostileServer, name: str) -> None:
    server.s3.always = HEADS[name]
    request = pb.StatRequest(store="s3", key="bucket/key")
    found = outcome(lambda: server.client.call("StatObject", request, timeout_s=PATIENCE_S))
    if isinstance(found, TorchCacheError):
        return
    assert found.version and 0 <= found.size < 1 << 50


BODY = b"x" * 100_000


def body(content: bytes, **headers: str) -> Line:
    def line(request: Request) -> bool:
        request.reply(200, content, headers={"ETag": '"e"', **headers})
        return True

    return line


BODIES: dict[str, Line] = {
    "shorter": body(BODY[:-1]),
    "longer": body(BODY + b"y"),
    "empty": body(b""),
    "a hundredfold": body(BODY * 100),
    "of another version": body(BODY, ETag='"f"'),
    "without a version": body(BODY, ETag=""),
    "a wrong checksum": body(BODY, **{"x-amz-checksum-crc32": "AAAAAA=="}),
    "a checksum that is none": body(BODY, **{"x-amz-checksum-crc32": "cheese"}),
    "gzip that says so": body(gzip.compress(BODY), **{"Content-Encoding": "gzip"}),
    "a part, unasked": body(BODY, **{"Content-Range": "bytes 5-9/10"}),
    "a negative length": body(BODY, **{"Content-Length": "-1"}),
    "a length that is none": body(BODY, **{"Content-Length": "x"}),
}


@pytest.mark.hostile("pages")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_lies_is_never_stored(server: HostileServer, name: str, again: bool) -> None:
    """`again`: once the bucket is known, GETs go without botocore. Each case has a bucket of its own."""
    bucket = f"bucket-{list(BODIES).index(name)}-{again}"
    ref = pb.ObjectRef(store="s3", key=f"{bucket}/body", version="e", size=len(BODY))
    if again:
        server.s3.always = body(BODY)
        assert server.client.read([ref]) == [BODY]
        server.client.call("Evict", pb.EvictRequest(namespace="n"))
    server.s3.always = BODIES[name]
    (got,) = server.client.read([ref], timeout_s=PATIENCE_S)
    if got == BODY:
        return  # what came was right after all, and its checksum is of no kind
    assert isinstance(got, str) and '"error"' in got
    (held,) = server.client.read([ref], resident_only=True)
    assert "NotResident" in str(held)
