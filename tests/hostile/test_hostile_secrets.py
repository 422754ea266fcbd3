"""Tokens and storage's credentials, looked for wherever something is said; the log is looked at after every case."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from torchcache_server.process.config import from_settings
from torchcache_server.process.tls import TlsContents
from torchcache_server.service.scopes import Tokens

from examples.seaweedfs import environment
from tests.hostile.hostile_server import ADMIN, SECRETS, STORAGE, HostileServer, outcome
from tests.unit.scripted_s3 import Request
from torchcache import connect
from torchcache.cli.app import run
from torchcache.lanes.access import Access, TlsConfig
from torchcache.tokens import parse_tokens
from torchcache.wire.request_ids import HEADER
from torchcache.wire.v1 import cache_pb2 as pb


def assert_told_no_secret(text: str) -> None:
    assert text, "something was said"
    assert not [secret for secret in SECRETS if secret in text]


CALLS = {
    "GetInfo": pb.InfoRequest,
    "GetStatus": pb.StatusRequest,
}


@pytest.mark.hostile("secrets")
@pytest.mark.parametrize("call", CALLS)
def test_a_server_does_not_tell_its_own(server: HostileServer, call: str) -> None:
    assert_told_no_secret(str(server.client.call(call, CALLS[call]())))


def echo(request: Request) -> bool:
    """Tells back all that it was told."""
    said = "".join(f"{name}: {value} " for name, value in request.headers.items())
    request.reply(
        400,
        f"<Error><Code>Strange{said[:0]}</Code><Message>{said} {STORAGE}</Message></Error>".replace(
            "'", ""
        ).encode(),
    )
    return True


def echo_as_code(request: Request) -> bool:
    code = request.headers.get("x-amz-security-token", "")
    request.reply(500, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
    return True


def echo_elsewhere(request: Request) -> bool:
    token = request.headers.get("x-amz-security-token", "")
    request.refuse(302, token, headers={"Location": f"http://{token}@x/?{token}"})
    return True


ECHOES = {"a message": echo, "a code": echo_as_code, "a place": echo_elsewhere}


@pytest.mark.hostile("secrets")
@pytest.mark.parametrize("call", ["StatObject", "ListObjects", "read"])
@pytest.mark.parametrize("name", ECHOES)
def test_what_a_storage_tells_back_is_not_told_on(server: HostileServer, name: str, call: str) -> None:
    """It knows the session's token, and a client must not learn it from an error."""
    server.s3.always = ECHOES[name]
    if call == "read":
        ref = pb.ObjectRef(store="s3", key="bucket/key", version="e", size=10)
        (got,) = server.client.read([ref], timeout_s=1.0)
        assert_told_no_secret(str(got))
        return
    ask = pb.ListRequest(store="s3", prefix="bucket/")
    request: Any = ask if call == "ListObjects" else pb.StatRequest(store="s3", key="bucket/key")
    assert_told_no_secret(str(outcome(lambda: server.client.call(call, request, timeout_s=1.0))))


@pytest.mark.hostile("secrets")
@pytest.mark.parametrize("call", ["GetInfo", "do_get"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_no_id_of_a_request(server: HostileServer, secret: str, call: str) -> None:
    """Ids of requests are logged: what a client puts there by mistake must not be."""
    if call == "GetInfo":
        server.raw(call, b"", metadata=[*server.client.metadata, (HEADER, secret)])
        return
    headers = [
        (b"authorization", f"Bearer {server.client.token}".encode()),
        (HEADER.encode(), secret.encode()),
    ]
    with pytest.raises((fl.FlightError, pa.ArrowException)) as refused:
        server.client.flight.do_get(fl.Ticket(b"\xff"), fl.FlightCallOptions(headers=headers)).read_all()
    assert_told_no_secret(str(refused.value))


@pytest.mark.hostile("secrets")
def test_no_secret_lies_in_the_store(server: HostileServer) -> None:
    for path in server.store.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in content], path


@pytest.mark.hostile("secrets")
def test_no_secret_is_in_the_arguments(server: HostileServer) -> None:
    """Any user of the machine may read them."""
    assert_told_no_secret(Path(f"/proc/{server.process.pid}/cmdline").read_text())


TLS = TlsContents(b"certificate", ADMIN.encode())

HOLDERS: dict[str, Callable[[Path], object]] = {
    "an access": lambda _: Access(token=ADMIN),
    "a pool": lambda _: connect("127.0.0.1:1", token=ADMIN),
    "a pool's tls": lambda _: TlsConfig(),
    "tokens": lambda _: Tokens(parse_tokens(ADMIN)),
    "a token": lambda _: parse_tokens(f"read {ADMIN}"),
    "a key": lambda _: TLS,
    "a server's settings": lambda folder: from_settings(
        {
            "store": str(folder),
            "capacity": "1GB",
            "under_stores": {"s3": "s3://"},
            "token_file": str(folder / "t"),
        }
    ),
}


@pytest.mark.hostile("secrets")
@pytest.mark.parametrize("name", HOLDERS)
def test_who_holds_a_secret_does_not_show_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "t").write_text(ADMIN)
    held = HOLDERS[name](tmp_path)
    assert_told_no_secret(f"{held!r} {held!s} {vars(held) if name == 'tokens' else ''}")


COMMANDS = {
    "status": (["status"], 0),
    "status as JSON": (["status", "--json"], 0),
    "ls of nothing": (["ls", "s3://nowhere/x"], None),
    "a stage of nothing": (["stage", "file:///nowhere"], None),
    "checkpoints of nothing": (["checkpoint", "ls", "file:///nowhere"], None),
}


@pytest.mark.hostile("secrets")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_tells_none(
    server: HostileServer, name: str, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    arguments, code = COMMANDS[name]
    host, port = server.address
    with environment(
        {"TORCHCACHE_POOL": f"{host}:{port}", "TORCHCACHE_TOKEN_FILE": str(server.token_file), **STORAGE}
    ):
        ended = run(arguments)
    assert code is None or ended == code
    said = capsys.readouterr()
    assert_told_no_secret(said.out + said.err)


@pytest.mark.hostile("secrets")
def test_an_error_that_travels_tells_none(server: HostileServer) -> None:
    """Errors pickle, across ranks."""
    host, port = server.address
    pool = connect(f"{host}:{port}", token=ADMIN[::-1], lane="flight")
    try:
        pool.stat("s3://bucket/key")
        raise AssertionError("it was served")
    except Exception as error:
        assert_told_no_secret(str(pickle.dumps(error)) + repr(error) + str(error.__cause__))
        assert ADMIN[::-1] not in str(pickle.dumps(error)) + repr(error)
    finally:
        pool.close()


@pytest.mark.hostile("secrets")
def test_storages_own_are_not_in_a_childs_sight(server: HostileServer) -> None:
    """What the server was given by its environment it shows to nobody but its own user."""
    status = Path(f"/proc/{server.process.pid}/environ").stat()
    assert status.st_uid == os.geteuid()
    assert not status.st_mode & 0o077
