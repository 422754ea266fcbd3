"""Where the servers of a pool come from: etcd and DNS, what is remembered of both, and what is refused."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest

from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access, TlsConfig
from torchcache.pool import discovery
from torchcache.pool.discovery import DnsMembers, EtcdMembers, member_source
from torchcache.pool.members import Endpoint, StaticMembers
from torchcache.registry import Announcement, RegistryAddress

DEADLINE = 0.0
TLS = Access(tls=TlsConfig())


class Etcd:
    """Stands for the registry, so that it may be away."""

    addresses: list[str] | None = None

    def __init__(self, address: RegistryAddress) -> None:
        assert address.name == "p"

    def servers(self) -> list[Announcement]:
        if self.addresses is None:
            raise ServerUnavailable("etcd is away")
        return [
            Announcement(server_id=str(i), address=address, instance="")
            for i, address in enumerate(self.addresses)
        ]

    def close(self) -> None:
        pass


@pytest.fixture
def etcd(monkeypatch: pytest.MonkeyPatch) -> type[Etcd]:
    monkeypatch.setattr(discovery, "Registry", Etcd)
    monkeypatch.setattr(Etcd, "addresses", None)
    return Etcd


def found(source: StaticMembers | EtcdMembers | DnsMembers) -> list[str]:
    return [endpoint.address for endpoint in source.resolve(deadline=DEADLINE)]


def etcd_members(access: Access = TLS) -> EtcdMembers:
    source = member_source("etcd://h/p", access)
    assert isinstance(source, EtcdMembers)
    return source


def test_servers_come_and_go(etcd: type[Etcd]) -> None:
    source = etcd_members()
    for addresses in (["a:1"], ["a:1", "b:2"], ["b:2"]):
        etcd.addresses = addresses
        assert found(source) == addresses


def test_while_etcd_is_away_those_seen_last_are_used_in_other_processes_too(etcd: type[Etcd]) -> None:
    etcd.addresses = ["a:1", "[::1]:2"]
    assert found(etcd_members()) == ["a:1", "[::1]:2"]
    etcd.addresses = None
    assert found(pickle.loads(pickle.dumps(etcd_members()))) == ["a:1", "[::1]:2"]


def test_an_etcd_that_was_never_there_is_an_error(etcd: type[Etcd]) -> None:
    with pytest.raises(ServerUnavailable, match="away"):
        found(etcd_members())


def test_what_is_remembered_may_be_damaged(etcd: type[Etcd], home: Path) -> None:
    etcd.addresses = ["a:1"]
    found(etcd_members())
    [file] = (home / "pools").iterdir()
    for text in ("", "{", "[1]", '[["a"]]', '[["a", "x"]]'):
        file.write_text(text)
        etcd.addresses = None
        with pytest.raises(ServerUnavailable):
            found(etcd_members())
    etcd.addresses = ["a:1"]
    assert found(etcd_members()) == ["a:1"]
    etcd.addresses = None
    assert found(etcd_members()) == ["a:1"]


def test_a_pool_that_nobody_has_joined_is_no_reason_to_ask_those_who_left(etcd: type[Etcd]) -> None:
    etcd.addresses = ["a:1"]
    found(etcd_members())
    etcd.addresses = []
    with pytest.raises(ServerUnavailable, match="no server has joined"):
        found(etcd_members())


def test_an_entry_that_names_no_server_is_left_out(etcd: type[Etcd]) -> None:
    etcd.addresses = ["a:1", "not/one", "", "b:99999"]
    assert found(etcd_members()) == ["a:1"]


def test_no_entry_makes_a_client_send_its_token_in_the_clear(etcd: type[Etcd]) -> None:
    etcd.addresses = ["127.0.0.1:1", "elsewhere:1"]
    with pytest.raises(ConfigurationError, match="elsewhere:1 without TLS"):
        found(etcd_members(Access()))


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str, port: int, type: socket.SocketKind) -> list[tuple[object, ...]]:
        assert name == "pool.example"
        return [(0, 0, 0, "", (host, port)) for host in ("10.0.0.2", "10.0.0.1", "10.0.0.2")]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    source = member_source("dns://pool.example", TLS)
    assert found(source) == ["10.0.0.1:7440", "10.0.0.2:7440"]  # type: ignore[arg-type]
    assert source.access.tls is not None
    assert source.access.tls.server_name == "pool.example", "addresses are in no certificate"


def test_localhost_needs_no_tls() -> None:
    source = member_source("dns://localhost:1", Access())
    assert Endpoint(host="127.0.0.1", port=1) in source.resolve(deadline=DEADLINE)


def test_a_name_elsewhere_needs_tls() -> None:
    with pytest.raises(ConfigurationError, match="without TLS"):
        member_source("dns://pool.example:1", Access())


@pytest.mark.parametrize("text", ["dns://", "dns://a/b", "dns://a:x", "dns://a,b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        member_source(text, TLS)
