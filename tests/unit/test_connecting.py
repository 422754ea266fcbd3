"""From what a user gives to a pool: addresses, tokens, and what is refused."""

from __future__ import annotations

import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchcache
from examples.seaweedfs import environment
from torchcache.connecting import connect
from torchcache.embedded import EmbeddedMembers, make_folder
from torchcache.errors import ConfigurationError
from torchcache.lanes.access import Access, TlsConfig
from torchcache.lanes.client_token import Exposure, exposure
from torchcache.local_pool import LocalPool, default_root
from torchcache.pool.members import DEFAULT_PORT, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:7440", ["host:7440"]),
        ("host", [f"host:{DEFAULT_PORT}"]),
        ("a:1,b:2", ["a:1", "b:2"]),
        ("a:1, b:2", ["a:1", "b:2"]),
        ("10.0.0.1:65535", ["10.0.0.1:65535"]),
        ("[::1]:7440", ["[::1]:7440"]),
        ("[::1]", [f"[::1]:{DEFAULT_PORT}"]),
    ],
)
def test_addresses(text: str, expected: list[str]) -> None:
    assert [endpoint.address for endpoint in parse_address(text)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a:1,",
        "host:",
        "host:x",
        "host:0",
        "host:65536",
        "::1:7440",
        "[host]:1",
        "a b:1",
        "u@h:1",
        "h/x:1",
        "h:²",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write host:7440"):
        parse_address(text)


@given(st.text(max_size=30))
def test_an_address_is_parsed_or_refused(text: str) -> None:
    try:
        endpoints = parse_address(text)
    except ConfigurationError:
        return
    assert parse_address(",".join(endpoint.address for endpoint in endpoints)) == endpoints


@pytest.mark.parametrize("text", ["http://host:1", "s3://bucket"])
def test_a_uri_is_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no pool address"):
        connect(text)


def test_a_server_named_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        connect("a:1,b:1,a:1")


def test_the_environment_names_the_pool() -> None:
    with environment({"TORCHCACHE_POOL": "127.0.0.1:1"}):
        assert connect().address == "127.0.0.1:1"
        assert connect("[::1]:2").address == "[::1]:2"


def test_without_an_address_it_is_the_embedded_pool(home: Path) -> None:
    pool = connect()
    assert pool.address == str(default_root())
    assert Path(pool.address).is_relative_to(home)
    assert not default_root().exists()  # nothing happens before the first use
    with environment({"AWS_ENDPOINT_URL": "http://other:1"}):
        assert connect().address != pool.address


def test_a_pool_is_its_own_connection() -> None:
    pool = connect("localhost:1")
    assert connect(pool) is pool
    local = LocalPool("/tmp/nowhere")
    assert connect(local) is local.pool
    for given_pool in (pool, local):
        with pytest.raises(ConfigurationError, match="belong to an address"):
            connect(given_pool, token="x")


def test_a_token_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="TORCHCACHE_POOL"):
        connect(token="x")


def token_file(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.touch(mode)
    path.chmod(mode)
    return path


def test_what_is_no_pool_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="pool=7"):
        connect(7)  # type: ignore[arg-type]


def test_the_token_comes_from_its_file_and_stays_there(home: Path) -> None:
    token_file(home).write_text("hush-hush\n")
    pool = connect("localhost:1")
    assert pool._source.access.bearer() == "Bearer hush-hush"
    assert b"hush" not in pickle.dumps(pool)
    with environment({"TORCHCACHE_TOKEN_FILE": str(home / "elsewhere")}):
        assert connect("localhost:1")._source.access.bearer() is None


def test_a_token_given_is_carried_but_never_shown() -> None:
    pool = connect("localhost:1", token="hush-hush")
    again = pickle.loads(pickle.dumps(pool))
    assert again._source.access.bearer() == "Bearer hush-hush"
    assert "hush" not in repr(pool) + repr(pool._source)


@pytest.mark.parametrize(
    "more", ["\n", "\nhush", "\0", " ", "\x7f", "\u00e9", "\udc80", "\r\nx-other: header"], ids=ascii
)
def test_a_token_that_cannot_travel_is_refused_and_not_shown(more: str) -> None:
    """gRPC would say "internal: Invalid metadata", or raise an error of another kind that holds the token."""
    pool = connect("localhost:1", token=f"hush-hush{more}")
    with pytest.raises(ConfigurationError, match=r"no token: .* without the line's end") as refused:
        pool.status()
    assert "hush" not in "".join(traceback.format_exception(refused.value)) + repr(refused.value)
    pool.close()


def test_a_token_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        Access(token_file=tmp_path).bearer()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_token_file_of_ours_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, mode)
    path.write_text("hush-hush")
    with pytest.raises(ConfigurationError, match=f"mode {mode:04o}.*chmod 600") as refused:
        Access(token_file=path).bearer()
    assert "hush" not in str(refused.value)
    path.chmod(0o600)
    assert Access(token_file=path).bearer() == "Bearer hush-hush"


@pytest.mark.parametrize(
    ("mode", "owner", "read_only", "is_to_us"),
    [
        (stat.S_IFREG | 0o600, 7, False, "private"),
        (stat.S_IFREG | 0o440, 7, False, "refused"),
        (stat.S_IFREG | 0o440, 0, True, "private"),  # a secret of Kubernetes, with fsGroup
        (stat.S_IFREG | 0o644, 0, True, "readable"),  # one without
        (stat.S_IFREG | 0o644, 7, True, "readable"),  # that, as root
        (stat.S_IFREG | 0o444, 0, False, "readable"),
        (stat.S_IFIFO | 0o644, 7, False, "private"),
    ],
)
def test_who_may_open_a_token_file(mode: int, owner: int, read_only: bool, is_to_us: Exposure) -> None:
    assert exposure(mode=mode, owner=owner, me=7, read_only=read_only) == is_to_us


def test_a_token_file_that_cannot_be_mended_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = token_file(tmp_path, 0o644)
    path.write_text("hush-hush")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with caplog.at_level(logging.WARNING, "torchcache.lanes.client_token"):
        assert [Access(token_file=path).bearer() for _ in range(3)] == ["Bearer hush-hush"] * 3
    (said,) = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert "mode 0644" in said
    assert "hush" not in said


def test_who_has_no_token_is_told_why(tmp_path: Path) -> None:
    assert "pass token=" in Access().without_token()
    path = tmp_path / "token"
    assert f"{path} doesn't exist" in Access(token_file=path).without_token()
    token_file(tmp_path)
    assert f"{path} holds no token" in Access(token_file=path).without_token()


@pytest.mark.parametrize("host", ["cache-1", "10.0.0.1", "localhost.example", "[2001:db8::1]", "0.0.0.0"])
def test_the_token_travels_to_no_other_machine_in_the_clear(host: str, tmp_path: Path) -> None:
    for address in (f"{host}:1", f"127.0.0.1:1,{host}:1"):
        with pytest.raises(ConfigurationError, match=r"in the clear.*tls=.*TORCHCACHE_TLS_CA"):
            connect(address, token="hush-hush")
        with (
            environment({"TORCHCACHE_POOL": address}),
            pytest.raises(ConfigurationError, match="in the clear"),
        ):
            connect()
    (tmp_path / "ca.pem").write_text("")
    with environment({"TORCHCACHE_TLS_CA": str(tmp_path / "ca.pem")}):
        assert connect(f"{host}:1")._source.access.tls == TlsConfig(ca=str(tmp_path / "ca.pem"))


def test_tls_needs_files_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        connect("localhost:1", tls=str(tmp_path / "ca.pem"))
    (tmp_path / "ca.pem").write_text("")
    assert connect("localhost:1", tls=str(tmp_path / "ca.pem"))._source.access.tls == TlsConfig(
        ca=str(tmp_path / "ca.pem")
    )
    with pytest.raises(ConfigurationError, match="belong together"):
        TlsConfig(certificate=tmp_path / "ca.pem")


@pytest.mark.parametrize("servers", [0, -1, 65, True, 1.5, "2"])
def test_a_local_pool_needs_servers(servers: int) -> None:
    with pytest.raises(ConfigurationError, match="1 to 64"):
        LocalPool(servers=servers)


@pytest.mark.parametrize("capacity", ["plenty", 0, "-1GB"])
def test_a_local_pool_needs_a_capacity_that_is_one(capacity: int | str) -> None:
    with pytest.raises(ConfigurationError):
        LocalPool(capacity=capacity)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="TORCHCACHE_HOME"):
        make_folder(tmp_path / "file" / "pool")


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigurationError, match="another user"):
        make_folder(tmp_path)


def test_the_embedded_pool_pickles_by_its_folder(tmp_path: Path) -> None:
    pool = LocalPool(tmp_path, capacity="2GB", servers=2).pool
    source = pickle.loads(pickle.dumps(pool))._source
    assert source == EmbeddedMembers(root=tmp_path, servers=2, capacity_bytes=2 * 10**9)


def test_public_names_are_there_and_lazy() -> None:
    for name in set(torchcache.__all__) & {"Pool", "LocalPool", "connect", "TlsConfig", "TorchCacheError"}:
        assert getattr(torchcache, name) is not None
    assert set(dir(torchcache)) == set(torchcache.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        torchcache.Nothing  # type: ignore[attr-defined]  # noqa: B018
    script = "import sys, torchcache; assert not {'torch', 'grpc', 'pyarrow'} & set(sys.modules); torchcache.connect"
    subprocess.run(
        [sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True, timeout=60
    )
