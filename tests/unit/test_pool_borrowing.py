"""Borrowing as the client asks for it: of all servers of the reservation, or not at all."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from torchcache.errors import DeadlineExceeded, OutOfSpace, Overloaded, ServerUnavailable, TorchCacheError
from torchcache.model import ObjectId
from torchcache.pool import saves
from torchcache.pool.saves import Saves
from torchcache.pool.writes import Writing
from torchcache.wire.v1 import cache_pb2

SIZES = {"a": 10, "b": 20, "c": 30}
REF = cache_pb2.SaveRef(store="s3", path="run/step-2", save_id="new")
BASE = cache_pb2.SaveRef(store="s3", path="run/step-1", save_id="old")


def borrow(answers: dict[str, list[list[str] | TorchCacheError]]) -> frozenset[str]:
    """What each server answers, one call after the other; what isn't borrowed of it is given back."""
    given_back: dict[str, list[str]] = {}
    lent_by = {server: turns[-1] for server, turns in answers.items()}

    def ask_member(server: str, method: str, request: Any, deadline: float) -> Any:
        if method == "ReturnFiles":
            assert request.save == REF
            given_back[server] = list(request.names)
            raise ServerUnavailable("it may be gone meanwhile")
        assert (method, list(request.names)) == ("BorrowFiles", sorted(SIZES))
        answer = answers[server].pop(0)
        if isinstance(answer, TorchCacheError):
            raise answer
        return SimpleNamespace(reply=cache_pb2.BorrowFilesReply(names=answer))

    session: Any = SimpleNamespace(
        current=SimpleNamespace(known=lambda server: server), ask_member=ask_member
    )
    lent = Saves(session).borrow(REF, BASE, SIZES, list(answers))
    assert not any(answers.values())
    for server, names in lent_by.items():
        assert given_back.get(server, []) == sorted(set(names) - lent if isinstance(names, list) else [])
    return lent


def test_what_all_lend_is_borrowed() -> None:
    assert borrow({"x": [["a", "b"]], "y": [["b", "c"]]}) == {"b"}
    assert borrow({"x": [["a", "b", "c", "more"]]}) == {"a", "b", "c"}
    assert borrow({}) == frozenset()


@pytest.mark.parametrize("error", [ServerUnavailable("gone"), DeadlineExceeded("late"), TorchCacheError("?")])
def test_nothing_is_borrowed_if_one_fails(error: TorchCacheError) -> None:
    assert borrow({"x": [["a", "b"]], "y": [error]}) == frozenset()


@pytest.mark.parametrize("all_copies", [False, True])
def test_that_a_copy_has_no_room_counts_while_some_can_be_made(all_copies: bool) -> None:
    """F11: else a save would have a copy less for what it borrows."""
    written: list[str] = []

    def write(server: str, *_: object, **__: object) -> int:
        if server == "copy":
            raise OutOfSpace("full")
        written.append(server)
        return 5

    def known(server: str) -> Any:
        return SimpleNamespace(lane=SimpleNamespace(write=partial(write, server)))

    session: Any = SimpleNamespace(
        without_copy=set(),
        budget=SimpleNamespace(earn=lambda: None),
        health=SimpleNamespace(answered=lambda server: None),
        count=lambda **_: None,
        first_members=lambda retry, deadline: SimpleNamespace(known=known),
    )
    writing = Writing(
        session, "save", durable=True, timeout_s=60, servers=["first", "copy"], all_copies=all_copies
    )
    objects = [(ObjectId("s3", "run/step-1/a", "save:new"), [b"bytes"])]
    if all_copies:
        with pytest.raises(OutOfSpace):
            writing.run(objects)
    else:
        writing.run(objects)
    assert written == ["first"]
    assert session.without_copy == (set() if all_copies else {("save", "copy")})


def test_one_that_is_busy_with_other_ranks_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "BORROW_AGAIN_S", 0.001)
    busy = Overloaded("16 others")
    assert borrow({"x": [busy, busy, ["a"]], "y": [["a", "b"]]}) == {"a"}
