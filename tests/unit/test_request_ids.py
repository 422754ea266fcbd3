"""Ids of requests: what is taken for one, and which lines and errors bear it."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.fill_queue import Fill, FillQueue
from torchcache_server.service.request_log import (
    Request,
    RequestLog,
    Throttle,
    current,
    served_stepwise,
    serving,
)
from torchcache_server.store import StoredChunk

from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotResident,
    ObjectNotFound,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.tokens import MIN_CHARACTERS
from torchcache.wire.request_ids import is_request_id, new_request_id, received_request_id
from torchcache.wire.status import decode_error, encode_error


def test_what_a_client_makes_is_taken() -> None:
    made = new_request_id()
    assert received_request_id([made]) == received_request_id([made.encode()]) == made
    assert received_request_id(["A-my_run-7"]) == "A-my_run-7"


@given(st.lists(st.one_of(st.text(max_size=40), st.binary(max_size=40)), max_size=3))
def test_whatever_comes_what_is_logged_is_an_id(values: list[str | bytes]) -> None:
    found = received_request_id(values)
    assert is_request_id(found)
    assert len(found) < MIN_CHARACTERS  # so it is no token
    assert found.isascii()
    assert not {" ", "\n", '"', "\\", "\x1b"} & set(found)


@pytest.mark.parametrize(
    "values", [[], [""], ["a", "a"], ["a b"], ["a\n"], ["-a"], ["x" * MIN_CHARACTERS], ["é"], [b"\xff"]]
)
def test_what_is_none_is_replaced(values: list[str | bytes]) -> None:
    assert received_request_id(values) not in values


def test_an_error_names_its_request_wherever_it_goes() -> None:
    error = ServerUnavailable("gone", object="s3://b/k", server="h:1", request_id="abc123")
    assert str(error) == "gone (object s3://b/k, server h:1, request abc123)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(decode_error(encode_error(error))) == str(error)
    assert decode_error(encode_error(TorchCacheError("x"), request_id="me")).request_id == "me"
    assert decode_error('{"error": "TorchCacheError", "message": "x", "request": "a\\nb"}').request_id is None


REQUEST = Request("one", "do_get", "ipv4:127.0.0.1:5")


def test_steps_of_a_stream_are_taken_for_its_request_in_any_thread() -> None:
    seen: list[Request | None] = []

    def steps() -> Generator[int, None, None]:
        try:
            for number in range(3):
                seen.append(current.get())
                yield number
        finally:
            seen.append(current.get())

    stream: Any = served_stepwise(REQUEST, steps())
    taken: list[int] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: taken.append(next(iter(stream))))
        thread.start()
        thread.join()
        assert current.get() is None
    stream.close()
    assert taken == [0, 1]
    assert seen == [REQUEST] * 3


def test_a_fill_is_of_the_request_that_asked_first() -> None:
    queue = FillQueue(threads=1, limit_bytes=10)
    found: Future[Request | None] = Future()

    def work(*_: object) -> StoredChunk:
        found.set_result(current.get())
        raise ObjectNotFound("nothing")

    try:
        with serving(REQUEST):
            fill = Fill("x", 1, work, float("inf"))
        queue.submit(fill)
        assert found.result(120) is REQUEST
        assert isinstance(fill.future.exception(120), ObjectNotFound)
    finally:
        queue.close()


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (NotResident("x"), logging.DEBUG),
        (ObjectNotFound("x"), logging.INFO),
        (ConfigurationError("x"), logging.INFO),
        (IntegrityError("x"), logging.WARNING),
        (TorchCacheError("x"), logging.WARNING),
    ],
)
def test_how_loud_a_failure_is(error: TorchCacheError, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "torchcache_server.requests"):
        RequestLog().failed("GetInfo", error)
    [record] = caplog.records
    assert record.levelno == level
    assert record.getMessage() == f"GetInfo failed: {type(error).__name__}: x"


def test_only_a_slow_call_is_told(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(slow_s=2.0)
    with caplog.at_level(logging.INFO, "torchcache_server.requests"):
        log.ended("do_get", 1.9, lambda: pytest.fail("it is not said"))
        log.ended("do_get", 2.0, lambda: ": all of it")
    assert [record.getMessage() for record in caplog.records] == ["do_get took 2.000 s: all of it"]


def test_who_asks_for_nonsense_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = RequestLog(throttle=Throttle(burst=3, rate_s=0.5, clock=lambda: now[0]))
    with caplog.at_level(logging.INFO, "torchcache_server.requests"):
        for _ in range(10):
            log.failed("Stage", ConfigurationError("no"))
        log.refused("a call", "a stranger")  # these are counted apart
        now[0] = 2.0
        log.failed("Stage", ConfigurationError("no"))
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == ["Stage failed: ConfigurationError: no"] * 3
    assert said[3:] == [
        "a call refused: a stranger",
        "Stage failed: ConfigurationError: no (7 such lines before it left out)",
    ]
