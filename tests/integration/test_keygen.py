"""`torchcache keygen`, and a server that serves only those whom the pool's own authority has signed."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pyarrow.flight as fl
import pytest
from cryptography import x509

from examples.seaweedfs import environment
from tests.integration.server_process import PlainClient, ServerProcess, refused
from torchcache import TlsConfig, connect
from torchcache.cli.app import run
from torchcache.errors import TorchCacheError
from torchcache.model import Extent
from torchcache.wire.v1 import cache_pb2


def keygen(folder: Path, *arguments: str, code: int = 0) -> None:
    assert run(["keygen", str(folder), *arguments]) == code


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    keygen(tmp_path / "keys", "--host", "cache-1.example", "--host", "127.0.0.1")
    return tmp_path / "keys"


def arguments(tmp_path: Path, keys: Path) -> list[object]:
    (tmp_path / "source").mkdir(exist_ok=True)
    (tmp_path / "source/a").write_bytes(b"content")
    return [
        *("--listen", "0.0.0.0:0", "--store", tmp_path / "store", "--capacity", "1GB"),
        *("--under-store", f"file=file://{tmp_path}/source"),
        *("--tls-cert", keys / "server.pem", "--tls-key", keys / "server-key.pem"),
        *("--tls-client-ca", keys / "ca.pem"),
    ]


def test_what_is_private_is_for_its_owner_alone(keys: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()}
    assert modes == {
        **dict.fromkeys(("ca.pem", "server.pem", "client.pem"), 0o644),
        **dict.fromkeys(("ca-key.pem", "server-key.pem", "client-key.pem", "token"), 0o600),
    }
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700


def test_again_the_authority_and_the_token_stay(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    capsys.readouterr()
    keygen(keys, "--host", "cache-2.example", "--days", "7", "--json")
    assert json.loads(capsys.readouterr().out)["authority_kept"] is True
    after = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert {name for name in after if before[name] == after[name]} == {"ca.pem", "ca-key.pem", "token"}
    server = x509.load_pem_x509_certificate(after["server.pem"])
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["cache-2.example"]
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 7
    server.verify_directly_issued_by(x509.load_pem_x509_certificate(after["ca.pem"]))


def test_half_an_authority_is_not_made_whole(keys: Path) -> None:
    (keys / "ca-key.pem").unlink()
    keygen(keys, "--host", "a", code=2)
    assert not (keys / "ca-key.pem").exists()


def test_a_token_of_less_scope_is_the_servers_too_and_stays(keys: Path) -> None:
    admin = (keys / "token").read_text()
    keygen(keys, "--host", "a", "--scope", "read", "--scope", "write", "--scope", "read")
    made = [(keys / name).read_text() for name in ("token-read", "token-write")]
    assert [text.split()[0] for text in made] == ["read", "write"]
    assert (keys / "token").read_text() == admin + "".join(made)
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.glob("token*")} == {0o600}
    keygen(keys, "--host", "a", "--scope", "read")
    assert (keys / "token").read_text() == admin + "".join(made)


def test_tokens_that_are_none_stop_it_and_stay(keys: Path) -> None:
    (keys / "token").write_text("short")
    keygen(keys, "--host", "a", "--scope", "read", code=2)
    assert (keys / "token").read_text() == "short"
    assert not (keys / "token-read").exists()


@pytest.mark.parametrize("host", ["", "a:7440", "https://a", "a b", "a/b", "ä.example"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    keygen(tmp_path / "keys", "--host", host, code=2)
    assert not list((tmp_path / "keys").iterdir())


def test_only_who_has_a_certificate_and_the_token_is_served(tmp_path: Path, keys: Path) -> None:
    """On both ports: the list comes by one, the bytes by the other."""
    with ServerProcess(
        *arguments(tmp_path, keys), "--token-file", keys / "token", token_file=keys / "token"
    ) as server:
        address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        settings = {
            "TORCHCACHE_POOL": address,
            "TORCHCACHE_TOKEN_FILE": str(keys / "token"),
            "TORCHCACHE_TLS_CA": str(keys / "ca.pem"),
            "TORCHCACHE_TLS_CERT": str(keys / "client.pem"),
            "TORCHCACHE_TLS_KEY": str(keys / "client-key.pem"),
            "TORCHCACHE_LANE": "flight",
        }
        with environment(settings):
            pool = connect()
            assert pool.read([Extent(info) for info in pool.list(f"file://{tmp_path}/source")]) == [
                b"content"
            ]
            infos = list(pool.list(f"file://{tmp_path}/source"))
            pool.close()
        plain = PlainClient(
            address, server.data_port, server.client.token, roots=(keys / "ca.pem").read_bytes()
        )
        with pytest.raises(fl.FlightUnavailableError):
            plain.open([])
        with pytest.raises(grpc.RpcError):
            plain.call("GetInfo", cache_pb2.InfoRequest(), timeout_s=5)
        plain.close()
        other = tmp_path / "other"
        keygen(other, "--host", "127.0.0.1")
        strangers = [
            TlsConfig(ca=keys / "ca.pem"),
            TlsConfig(ca=keys / "ca.pem", certificate=other / "client.pem", key=other / "client-key.pem"),
            TlsConfig(ca=other / "ca.pem", certificate=keys / "client.pem", key=keys / "client-key.pem"),
        ]
        for tls in strangers:
            pool = connect(address, token=server.client.token, tls=tls, lane="flight")
            with pytest.raises(TorchCacheError):
                pool.read([Extent(infos[0])], timeout_s=1.5)
            pool.close()


def test_a_server_says_which_file_is_no_authority(tmp_path: Path, keys: Path) -> None:
    (keys / "ca.pem").write_text("nothing of the kind")
    assert "ca.pem" in refused(*arguments(tmp_path, keys))


def test_without_cryptography_it_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None; from torchcache.cli.app import run; "
        f"sys.exit(run(['keygen', {str(tmp_path / 'keys')!r}, '--host', 'a']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torchcache[tls]" in done.stderr
