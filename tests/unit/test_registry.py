"""The registry: its addresses, and what may lie in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from etcd3gw.lease import Lease
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.registry import Announcement, Registry, RegistryAddress

SERVER = Announcement(server_id="s1", address="10.0.0.1:7440", instance="i1")
LEASE = Lease(7, client=None)  # of no host yet


@pytest.mark.parametrize(
    ("text", "hosts", "name"),
    [
        ("etcd://a/pool", (("a", 2379),), "pool"),
        ("etcd://a:1,b/x.y-z_1", (("a", 1), ("b", 2379)), "x.y-z_1"),
        ("etcd://[::1]:9/p", (("::1", 9),), "p"),
    ],
)
def test_addresses(text: str, hosts: tuple[tuple[str, int], ...], name: str) -> None:
    found = RegistryAddress.parse(text)
    assert (found.hosts, found.name) == (hosts, name)
    assert RegistryAddress.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "etcd://",
        "etcd://a",
        "etcd://a/",
        "etcd:///p",
        "etcd://a/p/q",
        "etcd://a/../p",
        "etcd://a:b/p",
        "a/p",
        "etcd://a,/p",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no pool in etcd|no server"):
        RegistryAddress.parse(text)


def test_pools_do_not_see_each_other() -> None:
    """One's name may begin as another's."""
    one, other = (RegistryAddress.parse(f"etcd://a/{name}").prefix for name in ("train", "train2"))
    assert not other.startswith(one)


def test_an_announcement_comes_back() -> None:
    assert Announcement.decode(SERVER.encode().encode()) == SERVER
    heavy = replace(SERVER, weight=0.1 * 7e12)
    assert Announcement.decode(heavy.encode().encode()) == heavy


@pytest.mark.parametrize(
    "said", ["NaN", "Infinity", "-1", "0", '"7"', "true", "null", "[]", "1e31", "1" + "0" * 400]
)
def test_a_weight_that_is_none_is_not_said(said: str) -> None:
    data = SERVER.encode().replace('"weight": 0.0', f'"weight": {said}')
    assert said in data
    assert Announcement.decode(data.encode()) == SERVER


def test_an_announcement_of_a_version_without_weights() -> None:
    fields = json.loads(SERVER.encode())
    del fields["weight"]
    assert Announcement.decode(json.dumps(fields).encode()) == SERVER


@given(st.binary(max_size=60) | st.from_type(dict[str, str]).map(lambda d: json.dumps(d).encode()))
def test_what_others_write_is_no_announcement(data: bytes) -> None:
    assert Announcement.decode(data) is None


def test_an_entry_of_any_size_is_no_announcement() -> None:
    assert Announcement.decode(SERVER.encode().encode() + b" " * 5000) is None
    assert Announcement.decode(b"[" * 4000) is None


def test_an_etcd_that_is_not_there_is_named() -> None:
    registry = Registry(RegistryAddress.parse("etcd://127.0.0.1:1,127.0.0.1:2/pool"))
    with pytest.raises(ServerUnavailable, match=r"127.0.0.1:1.*127.0.0.1:2"):
        registry.servers()
    registry.close()


class Odd(BaseHTTPRequestHandler):
    """Answers everything in the same way."""

    answer = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def do_GET(self) -> None:
        self.answer = b'{"etcdserver": "3.5.0"}'
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        *("[]", "null", '"x"', "7", "{", '{"kvs": null}', '{"kvs": 7}', '{"kvs": [null]}', '{"kvs": [{}]}'),
        *('{"ID": null}', '{"ID": []}', '{"ID": Infinity}', '{"result": []}', '{"result": {"TTL": null}}'),
        "[" * 100_000,
    ],
)
def test_an_answer_that_is_odd_is_none(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Whatever else was raised would end a server's membership, or a client's look-up."""
    monkeypatch.setattr(Odd, "answer", answer.encode())
    with HTTPServer(("127.0.0.1", 0), Odd) as etcd:
        serving = threading.Thread(target=etcd.serve_forever, args=(0.01,))
        serving.start()
        try:
            registry = Registry(RegistryAddress.parse(f"etcd://127.0.0.1:{etcd.server_port}/pool"))
            asked: list[Callable[[], object]] = [
                registry.servers,
                lambda: registry.announce(SERVER, 10),
                lambda: registry.keep(LEASE),
                lambda: registry.withdraw(LEASE),
            ]
            raised = 0
            for ask in asked:
                try:
                    ask()
                except ServerUnavailable:
                    raised += 1
            assert raised > 0
            registry.close()
        finally:
            etcd.shutdown()
            serving.join()
