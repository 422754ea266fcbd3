"""Keys that want to be paths: none leads out of the under-store's root, by any call that takes one."""

from __future__ import annotations

from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.hostile.hostile_server import CONTENT, SECRET, HostileServer, refusal
from torchcache.errors import (
    ConfigurationError,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.model import chunk_digest
from torchcache.wire.codec import encode_chunks
from torchcache.wire.status import error_from_flight, error_from_status
from torchcache.wire.v1 import cache_pb2 as pb

REFUSED = {
    "up": "../outside/secret",
    "far up": "../" * 40 + "etc/passwd",
    "up from a folder": "folder/../../outside/secret",
    "up and back": "folder/../a",
    "up at the end": "folder/..",
    "only up": "..",
    "here": ".",
    "here in front": "./a",
    "here amid": "folder/./a",
    "absolute": "/etc/passwd",
    "twice absolute": "//etc/passwd",
    "an empty segment": "folder//a",
    "a slash at the end": "folder/",
    "only a slash": "/",
    "nothing": "",
    "NUL": "a\0b",
    "a hidden end": "../outside/secret\0.jpg",
    "only NUL": "\0",
    "out by a link": "link-out/secret",
    "out by a link to a file": "link-file",
    "into a link's folder": "link-out/sub/new",
    "a circle of links": "link-in-a-circle",
    "a pipe": "pipes/pipe",
    "under a file": "a/b",
    "a name too long for a file": "n" * 300,
    "a path too long for a file": "d/" * 2040 + "f",
    "longer than any key": "k" * 5000,
    "a writer's own name": ".torchcache-tmp-0123456789abcdef",
}
"""Keys that are no object's."""

LINKS = {"out by a link to a file": "../outside/secret", "a circle of links": "link-in-a-circle"}

PLAIN = {
    "percent": "%2e%2e/outside/secret",
    "percent slash": "..%2foutside%2fsecret",
    "a backslash": "..\\outside\\secret",
    "wide dots": "\uff0e\uff0e/outside",
    "three dots": ".../outside",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "right to left": "\u202eterces",
    "a line's end": "a\nb",
    "an escape": "\x1b[2Ja",
    "a tilde": "~/secret",
    "an option": "-rf",
    "stars": "*",
    "a variable": "$HOME/x",
    "a device's name": "CON",
    "spaces": " a ",
}
"""Names like any other, however odd: what is stored so lies under just that name in the root."""


def stat(server: HostileServer, key: str) -> object:
    return server.client.call("StatObject", pb.StatRequest(store="file", key=key))


def read(server: HostileServer, key: str) -> object:
    """As if it had been listed before: with a version and a size."""
    found = (server.folder / "outside" / "secret").stat()
    version = f"{found.st_size}-{found.st_mtime_ns}"
    (got,) = server.client.read([pb.ObjectRef(store="file", key=key, version=version, size=found.st_size)])
    assert got != SECRET
    return got


def publish(server: HostileServer, key: str) -> Any:
    ref = pb.ObjectRef(store="file", key=key, version="save:hostile", size=len(CONTENT))
    row = (0, 0, chunk_digest(CONTENT), pa.py_buffer(CONTENT))
    server.put(f"put:file/{key}@hostile", [ref], [encode_chunks([row])])
    request = pb.PublishRequest(
        store="file", key=key, write_id="hostile", size=len(CONTENT), create_only=True, wait_s=10
    )
    return server.client.call("PublishObject", request)


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", REFUSED)
def test_no_such_key_is_looked_at(server: HostileServer, name: str) -> None:
    error = refusal(lambda: stat(server, REFUSED[name]))
    assert isinstance(error, ConfigurationError | ObjectNotFound)
    assert SECRET.decode() not in str(error)


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", REFUSED)
def test_no_such_key_is_read(server: HostileServer, name: str) -> None:
    try:
        got = read(server, REFUSED[name])
    except fl.FlightError as error:  # no key at all: the whole request is refused
        assert isinstance(error_from_flight(error), ConfigurationError)
    else:
        assert "ConfigurationError" in str(got) or "ObjectNotFound" in str(got)


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_stored_under_such_a_key(server: HostileServer, name: str) -> None:
    error = refusal(lambda: publish(server, REFUSED[name]))
    assert isinstance(error, TorchCacheError)
    assert not (server.folder / "outside" / "sub" / "new").exists()


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - LINKS.keys() - {"a pipe"}))
def test_nothing_is_deleted_by_such_a_key(server: HostileServer, name: str) -> None:
    """That there is nothing to delete is no error, and no other is known here."""
    try:
        server.client.call("DeleteObject", pb.DeleteRequest(store="file", key=REFUSED[name]))
    except grpc.RpcError as error:
        assert isinstance(error_from_status(error.code(), error.details()), ConfigurationError)


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", PLAIN)
def test_what_only_looks_odd_is_stored_under_its_name(server: HostileServer, name: str) -> None:
    key = PLAIN[name]
    reply = publish(server, key)
    path = server.source / key
    assert path.read_bytes() == CONTENT
    assert path.resolve().is_relative_to(server.source)
    assert [ref.key for ref in server.client.objects("file", key)] == [key]
    assert server.client.read([reply.object]) == [CONTENT]
    server.client.call("DeleteObject", pb.DeleteRequest(store="file", key=key))
    assert not path.exists()
    for folder in path.parents:
        if folder == server.source:
            break
        folder.rmdir()
    server.client.call("Evict", pb.EvictRequest(namespace=f"put:file/{key}@hostile"))


@pytest.mark.hostile("keys")
@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_deleted_and_not_what_it_leads_to(server: HostileServer, name: str) -> None:
    path = server.source / REFUSED[name]
    server.client.call("DeleteObject", pb.DeleteRequest(store="file", key=REFUSED[name]))
    assert not path.is_symlink()
    path.symlink_to(LINKS[name])
    server.note_surroundings()
