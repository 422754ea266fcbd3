"""Which save of a path a reader gets, where the servers of a pool know of different ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchcache.errors import NotCommitted, ServerUnavailable, TorchCacheError
from torchcache.pool.members import Member, Members
from torchcache.pool.saves import Saves
from torchcache.pool.session import Asked, Session
from torchcache.wire.v1 import cache_pb2


class Servers:
    """A session with servers that answer so, asked in the order of their ids."""

    def __init__(self, answers: Mapping[str, cache_pb2.SaveReply | TorchCacheError]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.ordering = SimpleNamespace(order=lambda key, members: sorted(members.by_id))
        self.members = Members({id_: cast(Member, Server(id_)) for id_ in answers})

    def ask_member(self, member: Server, method: str, request: Any, deadline: float) -> Asked:
        assert method == "GetSave"
        assert request.check_claim
        self.asked.append(member.server_id)
        answer = self.answers[member.server_id]
        if isinstance(answer, TorchCacheError):
            raise answer
        return Asked(cast(Member, member), answer)

    def get(self) -> str:
        request = cache_pb2.GetSaveRequest(store="s3", path="run/step-1")
        return Saves(cast(Session, self))._first(request, self.members, 1e18).save_id


class Server:
    weight = 1.0

    def __init__(self, server_id: str) -> None:
        self.server_id = self.address = server_id


def save(save_id: str, committed_unix_s: float = 1.0, **told: Any) -> cache_pb2.SaveReply:
    ref = cache_pb2.SaveRef(store="s3", path="run/step-1", save_id=save_id)
    return cache_pb2.SaveReply(
        save=ref, state=cache_pb2.SAVE_STATE_COMMITTED, committed_unix_s=committed_unix_s, **told
    )


AWAY = ServerUnavailable("away")
NOTHING = NotCommitted("nothing")


def test_the_first_that_is_certain_is_enough() -> None:
    servers = Servers({"a": NOTHING, "b": save("old"), "c": save("new")})
    assert servers.get() == "old"
    assert servers.asked == ["a", "b"]


def test_where_one_cannot_know_of_a_later_save_the_others_are_asked() -> None:
    servers = Servers({"a": save("old", 9.0, uncertain=True), "b": NOTHING, "c": save("new", 2.0), "d": AWAY})
    assert servers.get() == "new"


@pytest.mark.parametrize("committed_unix_s", [0.5, 1.0, 2.0])
def test_where_none_can_know_no_clock_decides(committed_unix_s: float) -> None:
    """F22: each commit has the time of its server's clock. The older of two would be what nobody wants back (I2)."""
    one, other = save("one", uncertain=True), save("other", committed_unix_s, uncertain=True)
    for answers in ({"a": one, "b": other, "c": AWAY}, {"a": other, "b": one, "c": AWAY}):
        with pytest.raises(ServerUnavailable, match="which of 2 checkpoints at run/step-1 is the last"):
            Servers(answers).get()


def test_where_none_can_know_the_one_that_all_have_is_taken() -> None:
    old = save("old", uncertain=True)
    assert Servers({"a": old, "b": save("old", 2.0, uncertain=True), "c": AWAY}).get() == "old"
    assert Servers({"a": old, "b": AWAY, "c": NOTHING}).get() == "old"
    assert Servers({"a": AWAY, "b": old}).get() == "old"


def test_who_is_told_of_a_later_save_is_not_taken() -> None:
    servers = Servers(
        {
            "a": save("old", uncertain=True),
            "b": save("older", 3.0, superseded=True),
            "c": save("", holder="d"),
        }
    )
    assert servers.get() == "old"


def test_a_later_save_that_cannot_be_reached_is_waited_for() -> None:
    """It was acknowledged: what it replaced is no answer, and nor is that there is nothing (I2)."""
    with pytest.raises(ServerUnavailable):
        Servers({"a": save("old", superseded=True), "b": AWAY}).get()


def test_what_one_knows_to_be_replaced_is_not_taken_from_another_that_does_not() -> None:
    known, unknown = save("old", superseded=True), save("old", uncertain=True)
    for answers in (
        {"a": known, "b": unknown},
        {"a": unknown, "b": known},
        {"a": AWAY, "b": known, "c": unknown},
    ):
        with pytest.raises(ServerUnavailable, match="later checkpoint"):
            Servers(answers).get()
    assert Servers({"a": unknown, "b": known, "c": save("new", 2.0, uncertain=True)}).get() == "new"


@pytest.mark.parametrize("without", ["published", "anything"])
def test_saves_that_follow_one_another_while_servers_are_asked_are_none_that_is_gone(without: str) -> None:
    """I2. `a` was asked when the second was the last, `b`, which had it, when the third was: at `c`, asked before."""
    first = save("first", superseded=True)
    first.later_save_id = "second"
    third = save("first", superseded=True)
    third.later_save_id = "third"
    if without == "anything":
        first = cache_pb2.SaveReply(holder="b", later_save_id="second")
        third = cache_pb2.SaveReply(holder="c", later_save_id="third")
    servers = Servers({"a": first, "b": third, "c": first})
    with pytest.raises(ServerUnavailable, match="again and again"):
        servers.get()
    servers = Servers({"a": first, "b": first, "c": NOTHING})
    if without == "anything":
        with pytest.raises(NotCommitted):
            servers.get()
    else:
        assert servers.get() == "first"


def test_a_later_save_that_nobody_has_any_more_is_given_up() -> None:
    assert Servers({"a": save("old", superseded=True), "b": NOTHING}).get() == "old"
