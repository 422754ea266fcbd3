"""Who comes to a server that wants certificates without one, or with one that isn't by the pool's authority."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.server_process import ServerProcess
from torchcache.cli.certificates import Pair, make_authority, make_certificate
from torchcache.wire.v1 import cache_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

OURS, OTHER = make_authority(), make_authority()

COMERS: dict[str, Callable[[], Pair | None]] = {
    "nobody's": lambda: None,
    "another authority's": lambda: make_certificate(OTHER, "client", (), days=1),
    "a server's": lambda: make_certificate(OURS, "server", ("127.0.0.1",), days=1),
    "one whose time is over": lambda: make_certificate(OURS, "client", (), days=0),
    "another authority's own": lambda: OTHER,
}
GOOD = "a client's"


def write(folder: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    files = folder / f"{name}.pem", folder / f"{name}-key.pem"
    files[0].write_bytes(pair.certificate)
    files[1].write_bytes(pair.key)
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    write(folder, "ca", OURS)
    write(folder, "server", make_certificate(OURS, "server", ("127.0.0.1",), days=1))
    write(folder, "client", make_certificate(OURS, "client", (), days=1))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    (folder / "source").mkdir()
    with ServerProcess(
        *("--listen", "127.0.0.1:0", "--store", folder / "store", "--capacity", "256MB"),
        *("--under-store", f"file=file://{folder}/source", "--token-file", folder / "token"),
        *("--tls-cert", folder / "server.pem", "--tls-key", folder / "server-key.pem"),
        *("--tls-client-ca", folder / "ca.pem"),
        token_file=folder / "token",
        log=folder / "log",
    ) as server:
        yield server


def context(folder: Path, files: tuple[Path, Path] | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    made.set_alpn_protocols(["h2"])
    if files is not None:
        made.load_cert_chain(*files)
    return made


def answer(server: ServerProcess, port: int, wrapped: ssl.SSLContext | None) -> bytes:
    """What the server says to the beginning of HTTP/2; nothing if it hangs up."""
    with socket.create_connection((server.address.rpartition(":")[0], port), timeout=20) as plain:
        connection = plain if wrapped is None else wrapped.wrap_socket(plain, server_hostname="127.0.0.1")
        with connection:
            try:
                connection.sendall(PREFACE)
                return connection.recv(100)
            except (ssl.SSLError, ConnectionError):
                return b""


def ports(server: ServerProcess) -> dict[str, int]:
    return {"control": int(server.address.rpartition(":")[2]), "data": server.data_port}


def assert_served(server: ServerProcess, folder: Path) -> None:
    assert server.process.poll() is None
    good = context(folder, (folder / "client.pem", folder / "client-key.pem"))
    for port in ports(server).values():
        assert answer(server, port, good)[3:4] == b"\4", "SETTINGS: it speaks HTTP/2 with whom it knows"
    assert "Traceback" not in (folder / "log").read_text()


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("port", ["control", "data"])
@pytest.mark.parametrize("name", COMERS)
def test_no_word_is_spoken_with_who_comes_with(
    server: ServerProcess, folder: Path, tmp_path: Path, name: str, port: str
) -> None:
    pair = COMERS[name]()
    files = write(tmp_path, "comer", pair) if pair is not None else None
    try:
        said = answer(server, ports(server)[port], context(folder, files))
    except ssl.SSLError:
        said = b""
    assert said == b""
    assert_served(server, folder)


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("port", ["control", "data"])
def test_no_word_is_spoken_in_the_clear(server: ServerProcess, folder: Path, port: str) -> None:
    said = answer(server, ports(server)[port], None)
    assert said[3:4] != b"\4"
    assert_served(server, folder)


@pytest.mark.hostile("auth")
@pytest.mark.parametrize("port", ["control", "data"])
def test_a_client_speaks_no_word_with_another_server(server: ServerProcess, folder: Path, port: str) -> None:
    """The other direction: by another authority, or of another name."""
    files = (folder / "client.pem", folder / "client-key.pem")
    stranger = context(folder, files)
    address = server.address.rpartition(":")[0], ports(server)[port]
    with socket.create_connection(address) as plain, pytest.raises(ssl.SSLCertVerificationError):
        stranger.wrap_socket(plain, server_hostname="cache-1.example")
    assert_served(server, folder)


@pytest.mark.hostile("auth")
def test_a_certificate_is_no_token(server: ServerProcess, folder: Path) -> None:
    """It opens the connection; what it may do the token says."""
    roots = (folder / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(
        roots, (folder / "client-key.pem").read_bytes(), (folder / "client.pem").read_bytes()
    )
    with grpc.secure_channel(server.address, credentials) as channel:
        call = channel.unary_unary(
            "/torchcache.v1.Control/GetInfo",
            request_serializer=pb.InfoRequest.SerializeToString,
            response_deserializer=pb.InfoReply.FromString,
        )
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as caught:
                call(pb.InfoRequest(), timeout=20, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert call(pb.InfoRequest(), timeout=20, metadata=server.client.metadata).version
