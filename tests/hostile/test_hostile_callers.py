"""Callers without a token, with one that is almost right, and with one that allows less than they ask for."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

import grpc
import pyarrow as pa
import pyarrow.flight as fl
import pytest
from torchcache_server.service.scopes import CONTROL, NEEDED

from tests.hostile.hostile_server import ADMIN, CONTENT, READ, SECRETS, WRITE, HostileServer, refusal
from tests.integration.server_process import PlainClient
from torchcache.errors import ConfigurationError
from torchcache.tokens import Scope
from torchcache.wire.v1 import cache_pb2 as pb

Headers = list[tuple[str, str]]

BEARER = f"Bearer {ADMIN}"
STRANGERS: dict[str, Headers] = {
    "nothing": [],
    "an empty value": [("authorization", "")],
    "a scheme alone": [("authorization", "Bearer")],
    "a scheme and a space": [("authorization", "Bearer ")],
    "the token alone": [("authorization", ADMIN)],
    "a scheme in lower case": [("authorization", f"bearer {ADMIN}")],
    "a scheme in upper case": [("authorization", f"BEARER {ADMIN}")],
    "another scheme": [("authorization", f"Basic {ADMIN}")],
    "no space": [("authorization", f"Bearer{ADMIN}")],
    "two spaces": [("authorization", f"Bearer  {ADMIN}")],
    "a scheme twice": [("authorization", f"Bearer {BEARER}")],
    "another token": [("authorization", "Bearer canary-nobody-5f1d0c6e9b27")],
    "all but the last character": [("authorization", BEARER[:-1])],
    "one character more": [("authorization", BEARER + "x")],
    "its last character twice": [("authorization", BEARER + BEARER[-1])],
    "in upper case": [("authorization", f"Bearer {ADMIN.upper()}")],
    "backwards": [("authorization", f"Bearer {ADMIN[::-1]}")],
    "in quotes": [("authorization", f'Bearer "{ADMIN}"')],
    "twice": [("authorization", BEARER), ("authorization", BEARER)],
    "right, then wrong": [("authorization", BEARER), ("authorization", "Bearer x")],
    "wrong, then right": [("authorization", "Bearer x"), ("authorization", BEARER)],
    "two of them": [("authorization", f"Bearer {READ}"), ("authorization", f"Bearer {WRITE}")],
    "two in one value": [("authorization", f"{BEARER}, {BEARER}")],
    "under another name": [("x-authorization", BEARER)],
    "a proxy's": [("proxy-authorization", BEARER)],
    "a cookie": [("cookie", f"authorization={BEARER}")],
    "its digest": [("authorization", f"Bearer {hashlib.sha256(BEARER.encode()).hexdigest()}")],
    "in base64": [("authorization", f"Bearer {base64.b64encode(ADMIN.encode()).decode()}")],
    "a line of the servers' file": [("authorization", f"Bearer read {READ}")],
    "a scope alone": [("authorization", "Bearer admin")],
    "seven thousand characters": [("authorization", "Bearer " + "x" * 7000)],
}


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_gets_no_answer_from_control(server: HostileServer, name: str) -> None:
    for method in ("GetInfo", "Evict", "Nothing"):
        with pytest.raises(grpc.RpcError) as caught:
            server.raw(method, b"", metadata=tuple(STRANGERS[name]))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_gets_no_byte(server: HostileServer, name: str) -> None:
    headers = [(key.encode(), value.encode()) for key, value in STRANGERS[name]]
    options = fl.FlightCallOptions(headers=headers, timeout=20)
    request = pb.ReadRequest(namespace="n", objects=[server.ref], object=[0], offset=[0], length=[-1])
    with pytest.raises(fl.FlightUnauthenticatedError) as caught:
        server.client.flight.do_get(fl.Ticket(request.SerializeToString()), options).read_all()
    assert not [secret for secret in (*SECRETS, CONTENT.decode()) if secret in str(caught.value)]


@pytest.fixture(scope="module")
def reader(hostile_server: HostileServer) -> Iterator[PlainClient]:
    client = hostile_server.with_token(READ)
    yield client
    client.close()


@pytest.fixture(scope="module")
def writer(hostile_server: HostileServer) -> Iterator[PlainClient]:
    client = hostile_server.with_token(WRITE)
    yield client
    client.close()


def of(scope: Scope) -> list[str]:
    """The control methods that need it."""
    found = (method for method, needed in NEEDED.items() if needed is scope)
    return sorted(method.removeprefix(CONTROL) for method in found if method.startswith(CONTROL))


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("method", of(Scope.WRITE) + of(Scope.ADMIN))
def test_a_reader_changes_nothing(server: HostileServer, reader: PlainClient, method: str) -> None:
    error = refusal(lambda: server.raw(method, b"", metadata=reader.metadata))
    assert isinstance(error, ConfigurationError)
    assert f"needs a token of scope {NEEDED[CONTROL + method]}" in str(error)
    assert "has scope read" in str(error)


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("method", of(Scope.ADMIN))
def test_a_writer_changes_nothing_for_others(server: HostileServer, writer: PlainClient, method: str) -> None:
    error = refusal(lambda: server.raw(method, b"", metadata=writer.metadata))
    assert isinstance(error, ConfigurationError)
    assert "needs a token of scope admin" in str(error)


@pytest.mark.hostile("auth")
def test_a_reader_stores_no_byte(server: HostileServer, reader: PlainClient) -> None:
    request = pb.WriteRequest(
        namespace="n", objects=[pb.ObjectRef(store="samples", key="k", version="1", size=1)]
    )
    descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())

    def write() -> None:
        stream, metadata = reader.flight.do_put(descriptor, pa.schema([]), reader.options)
        try:
            metadata.read()
        finally:
            stream.close()

    error = refusal(write)
    assert isinstance(error, ConfigurationError)
    assert "needs a token of scope write" in str(error)


def test_who_may_is_served(server: HostileServer, reader: PlainClient, writer: PlainClient) -> None:
    """Else all the refusals above would say little."""
    for client in (reader, writer):
        assert client.read(client.objects("file", "a")) == [CONTENT]
    path = server.source / "of a writer"
    ref = pb.SaveRef(store="file", path="of a writer", save_id="1")
    writer.call("ReserveSave", pb.ReserveSaveRequest(save=ref, writer="w"))
    writer.call("AbandonSave", pb.AbandonSaveRequest(save=ref))
    for left in [*path.rglob("*"), path] if path.exists() else []:
        left.rmdir() if left.is_dir() else left.unlink()
    server.note_surroundings()
    for client in (reader, writer):
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Evict", pb.EvictRequest(namespace="n"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
