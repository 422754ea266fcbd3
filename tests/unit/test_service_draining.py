"""The end of a server that a call asks for: who may be ended so, and what those who wait are told."""

from __future__ import annotations

import threading

import pytest
from torchcache_server.process.main import _draining
from torchcache_server.service.draining import Draining

from torchcache.errors import ConfigurationError


def test_it_is_begun_and_told_of() -> None:
    begun: list[int] = []
    draining = Draining(lambda: begun.append(1))
    draining.begin()
    draining.begin()
    assert begun == [1, 1]
    assert draining.wait(0) is None
    thread = threading.Thread(target=draining.done, args=(["s3://bucket/a"],))
    thread.start()
    assert draining.wait(1e9) == ["s3://bucket/a"]
    thread.join()


def test_who_waits_hears_of_the_end_at_once() -> None:
    draining = Draining(lambda: None)
    found: list[list[str] | None] = []
    thread = threading.Thread(target=lambda: found.append(draining.wait(1e9)))
    thread.start()
    draining.done([])
    thread.join()
    assert found == [[]]


def test_the_end_waits_for_who_asked_for_it() -> None:
    """Who asks again every second isn't waiting at each moment; a server that has little to do is through by then."""
    draining = Draining(lambda: None)
    draining.begin()
    assert draining.wait(0) is None
    thread = threading.Thread(target=draining.done, args=([],))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert draining.wait(0) == []
    thread.join()


def test_an_end_that_no_call_asked_for_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchcache_server.service.draining.LINGER_S", 3600.0)
    Draining(lambda: None).done([])


def test_a_server_that_would_be_started_again_is_not_ended_so() -> None:
    stop = threading.Event()
    with pytest.raises(ConfigurationError, match="send SIGTERM to the process that runs them"):
        _draining(stop, supervised=True).begin()
    assert not stop.is_set()
    _draining(stop, supervised=False).begin()
    assert stop.is_set()
