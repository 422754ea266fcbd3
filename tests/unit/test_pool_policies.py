"""Policies are told to every server, and it is said which were not reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from examples.ports import free_port
from tests.conformance.standin import Script, StandIn
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError, OutOfSpace, Overloaded, ServerUnavailable
from torchcache.pool import NamespaceStatus, Pool
from torchcache.wire.v1 import cache_pb2


@pytest.fixture
def servers() -> Iterator[dict[str, StandIn]]:
    with ExitStack() as stack:
        # On ports that the kernel gives to nobody while a server is away.
        yield {
            name: stack.enter_context(StandIn(Script(server_id=name), port=free_port(beside=1)))
            for name in ("a", "b", "c")
        }


@pytest.fixture
def pool(servers: dict[str, StandIn]) -> Iterator[Pool]:
    pool = connect(",".join(server.address for server in servers.values()), token="secret")
    yield pool
    pool.close()


def asked(server: StandIn, method: str) -> list[cache_pb2.SetPolicyRequest]:
    return [request for name, request in server.script.calls if name == method]


def test_every_server_is_told_what_is_given_and_nothing_else(servers: dict[str, StandIn], pool: Pool) -> None:
    told = pool.set_policy("d", pinned=False, priority=0)
    there = NamespaceStatus(name="d", bytes=5, chunks=1, pinned=True, dirty=False, quota_bytes=7)
    assert told == {server.address: there for server in servers.values()}
    for server in servers.values():
        [request] = asked(server, "SetPolicy")
        assert request.namespace == "d"
        assert {f.name for f, _ in request.ListFields()} == {"namespace", "pinned", "priority"}


@pytest.mark.parametrize(
    ("quota", "shares"), [(11, [4, 4, 3]), (1, [1, 1, 1]), (0, [0, 0, 0]), (-3, [-3] * 3)]
)
def test_a_quota_is_the_pools_and_each_server_gets_a_share(
    servers: dict[str, StandIn], pool: Pool, quota: int, shares: list[int]
) -> None:
    pool.set_policy("d", quota_bytes=quota, ttl_s=0.0)
    requests = [asked(server, "SetPolicy")[0] for server in servers.values()]
    assert [request.quota_bytes for request in requests] == shares
    assert all(request.HasField("quota_bytes") and request.HasField("ttl_s") for request in requests)


def test_a_quota_is_shared_by_weight(servers: dict[str, StandIn], pool: Pool) -> None:
    for server, weight in zip(servers.values(), (1e9, 2e9, 5e9), strict=True):
        server.script.weight = weight
    pool.set_policy("d", quota_bytes=82)
    requests = [asked(server, "SetPolicy")[0] for server in servers.values()]
    assert [request.quota_bytes for request in requests] == [11, 20, 51]


def test_evicted_bytes_are_summed(servers: dict[str, StandIn], pool: Pool) -> None:
    assert pool.evict("d") == 15
    assert all(asked(server, "Evict") for server in servers.values())


CALLS: list[Callable[[Pool], object]] = [
    lambda pool: pool.set_policy("d", pinned=True),
    lambda pool: pool.evict("d"),
]


@pytest.mark.parametrize("call", CALLS, ids=["set_policy", "evict"])
def test_a_server_that_went_is_named_and_the_others_are_told(
    servers: dict[str, StandIn], pool: Pool, call: Callable[[Pool], object]
) -> None:
    """F17."""
    pool.status()
    servers["b"].__exit__(None, None, None)
    with pytest.raises(ServerUnavailable) as caught:
        call(pool)
    assert caught.value.server == servers["b"].address
    assert f"d didn't get to {servers['b'].address}; it is at " in caught.value.message
    for name in ("a", "c"):
        assert [method for method, _ in servers[name].script.calls if method in ("SetPolicy", "Evict")]
        assert servers[name].address in caught.value.message
    servers["b"].__enter__()


def test_a_server_that_never_answered_is_named_and_its_share_set_aside(servers: dict[str, StandIn]) -> None:
    pool = connect(f"127.0.0.1:1,{servers['a'].address}", token="secret")
    with pytest.raises(ServerUnavailable, match=r"didn't get to 127\.0\.0\.1:1; it is at "):
        pool.set_policy("d", quota_bytes=100)
    assert asked(servers["a"], "SetPolicy")[0].quota_bytes == 50
    pool.close()


def test_a_server_that_comes_back_is_told(servers: dict[str, StandIn], pool: Pool) -> None:
    """It was away when the pool was looked at last, and is no longer: nobody is named then."""
    pool.status()
    servers["b"].__exit__(None, None, None)
    with pytest.raises(ServerUnavailable):
        pool.evict("d")
    with StandIn(Script(server_id="b"), port=servers["b"].port) as returned:
        assert pool.set_policy("d", quota_bytes=9)[returned.address].bytes == 5
        assert asked(returned, "SetPolicy")[0].quota_bytes == 3


def test_a_busy_server_is_asked_again(servers: dict[str, StandIn], pool: Pool) -> None:
    servers["b"].script.fail_calls = [Overloaded("busy")]
    assert len(pool.set_policy("d", pinned=True)) == 3
    assert len(asked(servers["b"], "SetPolicy")) == 2


def test_a_refusal_is_raised_after_the_others_were_told(servers: dict[str, StandIn], pool: Pool) -> None:
    """F11: one server's full disk doesn't keep the policy from the others."""
    servers["a"].script.fail_calls = [OutOfSpace("the disk is full")]
    with pytest.raises(OutOfSpace, match="the disk is full"):
        pool.set_policy("d", pinned=True)
    assert all(asked(servers[name], "SetPolicy") for name in ("b", "c"))


@pytest.mark.parametrize("given", [{"priority": 2**31}, {"quota_bytes": 2**63}])
def test_what_the_wire_can_not_carry_is_refused(
    servers: dict[str, StandIn], pool: Pool, given: dict[str, int]
) -> None:
    with pytest.raises(ConfigurationError, match="beyond what there can be"):
        pool.set_policy("d", **given)  # type: ignore[arg-type]
    assert not any(server.script.calls for server in servers.values())
