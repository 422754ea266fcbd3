"""Off loopback: TLS on both ports, and nothing in the clear."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import urllib.request
from pathlib import Path

import grpc
import pyarrow.flight as fl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from examples.ports import free_port
from examples.seaweedfs import environment
from tests.integration.server_process import PlainClient, ServerProcess, refused
from torchcache import connect
from torchcache.model import Extent
from torchcache.wire.v1 import cache_pb2 as pb


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "torchcache test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_file, key_file


def test_both_ports_speak_tls_and_only_that(
    tmp_path: Path, home: Path, certificate: tuple[Path, Path]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"content")
    with ServerProcess(
        *("--listen", "0.0.0.0:0", "--store", tmp_path / "store", "--capacity", "1GB"),
        *("--metrics-host", "0.0.0.0", "--metrics-port", metrics_port := free_port(beside=1)),
        *(
            "--under-store",
            f"file=file://{source}",
            "--tls-cert",
            certificate[0],
            "--tls-key",
            certificate[1],
        ),
        token_file=home / "token",
    ) as server:
        address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        roots = certificate[0].read_bytes()
        client = PlainClient(address, server.data_port, server.client.token, roots=roots)
        assert client.read(client.objects("file")) == [b"content"]
        client.close()
        scrape = urllib.request.Request(
            f"https://127.0.0.1:{metrics_port}/metrics",
            headers={"Authorization": f"Bearer {server.client.token}"},
        )
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with urllib.request.urlopen(scrape, timeout=60, context=context) as answer:
            assert b"torchcache_read_calls_total 1.0" in answer.read()
        with environment({"TORCHCACHE_TLS_CA": str(certificate[0])}):
            pool = connect(address, token=server.client.token)
        assert pool.read([Extent(info) for info in pool.list(f"file://{source}")]) == [b"content"]
        pool.close()

        clear = PlainClient(address, server.data_port, server.client.token)
        with pytest.raises(grpc.RpcError):
            clear.call("GetInfo", pb.InfoRequest(), timeout_s=5)
        with pytest.raises(fl.FlightUnavailableError):
            clear.open([])
        clear.close()

        tokenless = PlainClient(address, server.data_port, "wrong", roots=roots)
        with pytest.raises(grpc.RpcError) as caught:
            tokenless.call("GetInfo", pb.InfoRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(fl.FlightUnauthenticatedError):
            tokenless.open([])
        tokenless.close()


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem"])
def test_broken_tls_files_stop_the_start(tmp_path: Path, certificate: tuple[Path, Path], broken: str) -> None:
    arguments = (
        *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
        *(
            "--under-store",
            f"file=file://{tmp_path}",
            "--tls-cert",
            certificate[0],
            "--tls-key",
            certificate[1],
        ),
    )
    (tmp_path / broken).write_text("nothing of the kind")
    assert "TLS" in refused(*arguments)
    (tmp_path / broken).unlink()
    assert broken in refused(*arguments)
