"""A process that ends while its saves are on their way."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conformance.standin import StandIn
from torchcache.connecting import connect
from torchcache.errors import NotCommitted
from torchcache.pool import Pool
from torchcache.pool.farewell import Farewell
from torchcache.wire.v1 import cache_pb2


class Uploading(StandIn):
    """Its saves become durable after some questions."""

    questions = 3

    def answer(self, method: str, request: object) -> object:
        if method != "GetSave":
            return super().answer(method, request)
        self.questions -= 1
        state = cache_pb2.SAVE_STATE_COMMITTED if self.questions > 0 else cache_pb2.SAVE_STATE_DURABLE
        return cache_pb2.SaveReply(save=cache_pb2.SaveRef(save_id="id"), state=state)


@pytest.fixture
def server() -> Iterator[Uploading]:
    with Uploading() as server:
        yield server


@pytest.fixture
def pool(server: Uploading) -> Iterator[Pool]:
    pool = connect(server.address, token="secret")
    yield pool
    pool.close()


@pytest.fixture
def parting(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farewell]:
    monkeypatch.setattr("torchcache.pool.farewell.POLL_S", 0.001)
    registered: list[object] = []
    monkeypatch.setattr("atexit.register", registered.append)
    parting = Farewell()
    parting.expect(pool, "s3", "b/run", "", "id")
    assert registered == [parting.wait]
    yield parting


def test_it_waits_until_they_are_durable_and_says_so(
    server: Uploading, parting: Farewell, capsys: pytest.CaptureFixture[str]
) -> None:
    parting.wait()
    assert server.questions == 0
    assert capsys.readouterr().err.count("waiting for 1 save to reach the under-store") == 1


def test_what_is_durable_is_not_waited_for(
    server: Uploading, parting: Farewell, capsys: pytest.CaptureFixture[str]
) -> None:
    server.questions = 0
    parting.wait()
    assert capsys.readouterr().err == ""


def test_the_wait_is_bounded(server: Uploading, parting: Farewell) -> None:
    server.questions = 10**9
    parting.wait(0.05)
    assert 0 < 10**9 - server.questions < 10**6


def test_ctrl_c_leaves(server: Uploading, parting: Farewell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    server.questions = 10**9
    monkeypatch.setattr("torchcache.pool.farewell.time.sleep", interrupt)
    parting.wait()
    assert server.questions == 10**9 - 1


def test_a_save_that_is_gone_is_not_waited_for(server: Uploading, parting: Farewell) -> None:
    server.script.fail_calls = [NotCommitted("taken over")]
    parting.wait()
    assert server.questions == 3


def test_a_save_of_another_since_is_not_waited_for(server: Uploading, pool: Pool, parting: Farewell) -> None:
    server.questions = 10**9
    parting.forget(pool.address)
    parting.expect(pool, "s3", "b/run", "", "an earlier one")
    parting.wait()
    assert server.questions == 10**9 - 1


def test_a_closed_pool_is_forgotten(server: Uploading, pool: Pool, parting: Farewell) -> None:
    parting.forget(pool.address)
    parting.wait()
    assert server.questions == 3


def test_a_child_does_not_wait_for_its_parents_saves(
    server: Uploading, parting: Farewell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    parting.wait()
    assert server.questions == 3
