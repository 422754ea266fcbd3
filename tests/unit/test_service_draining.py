"""The end of a server that a call asks for: who may be ended so, and what those who wait are told."""

from __future__ import annotations

import threading

import pytest
from torchcache_server.process.main import _draining
from torchcache_server.service.draining import Draining

from tests.waiting import until
from torchcache.errors import ConfigurationError


def test_it_is_begun_and_told_of() -> None:
    begun: list[int] = []
    draining = Draining(lambda: begun.append(1))
    draining.begin()
    draining.begin()
    assert begun == [1, 1]
    assert draining.wait(0) is None
    draining.done(["s3://bucket/a"])
    assert draining.wait(0) == ["s3://bucket/a"]


def test_who_waits_hears_of_the_end_at_once() -> None:
    draining = Draining(lambda: None)
    found: list[list[str] | None] = []
    thread = threading.Thread(target=lambda: found.append(draining.wait(1e9)))
    thread.start()
    draining.done([])
    thread.join()
    assert found == [[]]


def test_the_end_waits_for_who_watches_it() -> None:
    """Who asks again every second isn't waiting at each moment."""
    draining = Draining(lambda: None)
    assert draining.wait(1e-9) is None
    thread = threading.Thread(target=draining.done, args=([],))
    thread.start()
    until(lambda: draining.wait(0) is not None)
    thread.join()


def test_a_server_that_would_be_started_again_is_not_ended_so() -> None:
    stop = threading.Event()
    with pytest.raises(ConfigurationError, match="send SIGTERM to the process that runs them"):
        _draining(stop, supervised=True).begin()
    assert not stop.is_set()
    _draining(stop, supervised=False).begin()
    assert stop.is_set()
