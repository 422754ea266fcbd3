"""Where the servers of a pool come from: etcd and DNS, what is remembered of both, and what is refused."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import Self, TypeVar

import pytest

from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access, TlsConfig
from torchcache.pool import discovery
from torchcache.pool.discovery import EtcdMembers, member_source
from torchcache.pool.health import Health
from torchcache.pool.members import Endpoint, MemberSource
from torchcache.pool.roster import Roster
from torchcache.registry import Announcement, Registry, RegistryAddress

TLS = Access(tls=TlsConfig())
T = TypeVar("T")


class Etcd:
    """Stands for the registry, so that it may be away."""

    addresses: list[str] | None = None

    def __init__(self, address: RegistryAddress) -> None:
        assert address.name == "p"

    def servers(self, *, deadline: float) -> list[Announcement]:
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


def found(source: MemberSource) -> list[str]:
    return [endpoint.address for endpoint in source.resolve(deadline=monotonic() + 60)]


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
    assert found(source) == ["10.0.0.1:7440", "10.0.0.2:7440"]
    assert source.access.tls is not None
    assert source.access.tls.server_name == "pool.example", "addresses are in no certificate"


def test_localhost_needs_no_tls() -> None:
    source = member_source("dns://localhost:1", Access())
    assert Endpoint(host="127.0.0.1", port=1) in source.resolve(deadline=monotonic() + 60)


def test_a_name_elsewhere_needs_tls() -> None:
    with pytest.raises(ConfigurationError, match="without TLS"):
        member_source("dns://pool.example:1", Access())


@pytest.mark.parametrize("text", ["dns://", "dns://a/b", "dns://a:x", "dns://a,b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        member_source(text, TLS)


# ---- who is asked and doesn't answer, or not to the end ----


def within_a_minute(work: Callable[[], T]) -> T:
    """What `work` gives or raises. Fails where it doesn't come back: it would have to be told to."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(60)


class Peers:
    """Hosts that take connections, and answer what `answer` does with each; nothing, by default."""

    def __init__(
        self, count: int, answer: Callable[[socket.socket, threading.Event], None] | None = None
    ) -> None:
        self.done = threading.Event()
        self.listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        self._answer = answer
        self._taken: list[socket.socket] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(one,)) for one in self.listeners if answer
        ]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        return f"etcd://{','.join(f'127.0.0.1:{one.getsockname()[1]}' for one in self.listeners)}/p"

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                taken, _ = listener.accept()
                with taken, suppress(OSError):
                    assert self._answer is not None
                    self._answer(taken, self.done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for listener in self.listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()


def trickle(taken: socket.socket, done: threading.Event) -> None:
    """An answer of which there is always some more."""
    taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not done.wait(0.05):
        taken.sendall(b" ")


@pytest.mark.parametrize("answer", [None, trickle])
def test_a_look_up_ends_by_its_deadline(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket, threading.Event], None] | None
) -> None:
    monkeypatch.setattr("torchcache.registry.TIMEOUT_S", 3600.0)
    with Peers(4, answer) as peers:
        source = member_source(peers.address, TLS)
        with pytest.raises(ServerUnavailable, match=r"can't be looked up|no host of"):
            within_a_minute(lambda: source.resolve(deadline=monotonic() + 0.5))


def test_a_host_that_is_silent_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache.registry.TIMEOUT_S", 3600.0)

    def odd(taken: socket.socket, done: threading.Event) -> None:
        taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnull")

    with Peers(1) as silent, Peers(1, odd) as other:
        hosts = f"{silent.address.removesuffix('/p')},{other.address.removeprefix('etcd://')}"
        with (
            closing(Registry(RegistryAddress.parse(hosts))) as registry,
            pytest.raises(ServerUnavailable) as caught,
        ):
            within_a_minute(lambda: registry.servers(deadline=monotonic() + 4))
    assert "no time left" not in str(caught.value)


class Names:
    """Stands for DNS: it answers once it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts = ["10.0.0.1"]
        self.may = threading.Event()
        self.may.set()
        monkeypatch.setattr(socket, "getaddrinfo", self._look)

    def _look(self, name: str, port: int, type: socket.SocketKind) -> list[tuple[object, ...]]:
        self.may.wait()
        return [(0, 0, 0, "", (host, port)) for host in self.hosts]


def test_who_was_there_last_is_asked_while_a_look_up_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "PATIENCE_S", 0.01)
    names = Names(monkeypatch)
    source = member_source("dns://pool.example", TLS)
    assert found(source) == ["10.0.0.1:7440"]
    names.may.clear()
    names.hosts = ["10.0.0.2"]
    try:
        assert within_a_minute(lambda: found(source)) == ["10.0.0.1:7440"]
    finally:
        names.may.set()
    for thread in threading.enumerate():
        if "look-up" in thread.name:
            thread.join()
    names.may.clear()
    try:
        late = within_a_minute(lambda: found(source))
        assert late == ["10.0.0.2:7440"], "what a look-up found that nobody waited for is remembered"
    finally:
        names.may.set()


def test_look_ups_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    names.may.clear()
    source = member_source("dns://another.example", TLS)
    try:
        for _ in range(discovery.MOST_LOOK_UPS):
            with pytest.raises(ServerUnavailable, match="no answer within"):
                source.resolve(deadline=monotonic() + 0.01)
        with pytest.raises(ServerUnavailable, match=r"16 look-ups of .* hang"):
            source.resolve(deadline=monotonic() + 60)
    finally:
        names.may.set()


def test_one_who_comes_while_another_looks_waits_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = Names(monkeypatch)
    names.may.clear()
    roster = Roster(member_source("dns://slow.example", TLS), "auto", Health(), lambda: None)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(roster.members, monotonic() + 60)
        try:
            while not any("slow.example" in thread.name for thread in threading.enumerate()):
                threading.Event().wait(0.01)
            with pytest.raises(ServerUnavailable, match="still being looked for"):
                roster.members(monotonic() + 0.01)
        finally:
            names.hosts = []
            names.may.set()
        with pytest.raises(ServerUnavailable, match="no server has joined"):
            first.result(60)


@pytest.mark.parametrize(
    "address",
    [
        "etcd://user:hush@h/p",
        "etcd://hush@h/p",
        "etcd://h:1,user:hush@g/p",
        "etcd://user:hu/hush@h/p",
        "etcd://user:hu,hush@h/p",
        "etcd://user:hush@h",
        "dns://user:hush@h",
        "dns://user:hu@hush@h",
        "user:hush@h:7440",
        "user:hu://hush@h:7440",
        "unix:///a.sock,user:hush@h:7440",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(ConfigurationError, match="has a user or a password in it") as refused:
        member_source(address, TLS)
    assert "hu" not in str(refused.value)
    assert "[hidden]@" in str(refused.value)
    if address.startswith("etcd"):
        with pytest.raises(ConfigurationError) as refused:  # as `--join` takes it
            RegistryAddress.parse(address)
        assert "hu" not in str(refused.value)


def test_a_path_with_an_at_is_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"unix:///run/a@b\.sock"):
        member_source("unix:///run/a@b.sock", TLS)
