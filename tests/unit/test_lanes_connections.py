"""The gate between calls and forks. Real forks with live gRPC are in tests/integration/test_processes.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from torchcache.errors import ConfigurationError
from torchcache.lanes import connections as module
from torchcache.lanes.connections import Connections


class Channel:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def quiet() -> dict[str, str]:
    return {}


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_one_channel_a_key_until_it_is_dropped() -> None:
    registry = Connections(quiet)
    with registry.call():
        first = registry.channel("a", Channel)
        assert registry.channel("a", Channel) is first
        assert registry.channel("b", Channel) is not first
    registry.drop("a")
    assert first.closed
    with registry.call():
        assert registry.channel("a", Channel) is not first


def test_a_fork_closes_every_channel() -> None:
    registry = Connections(quiet)
    with registry.call():
        channels = [registry.channel(key, Channel) for key in range(3)]
    registry.before_fork()
    assert all(channel.closed for channel in channels)
    registry.after_fork_in_parent()
    with registry.call():
        assert not registry.channel(0, Channel).closed


def test_a_fork_waits_for_calls_in_flight_and_holds_new_ones_back() -> None:
    registry = Connections(quiet)
    entered, leave = threading.Event(), threading.Event()
    events: list[str] = []

    def first_call() -> None:
        with registry.call():
            entered.set()
            leave.wait()
            events.append("first call ends")

    def fork() -> None:
        registry.before_fork()
        events.append("fork")
        registry.after_fork_in_parent()

    def second_call() -> None:
        with registry.call():
            events.append("second call")

    caller = in_thread(first_call)
    entered.wait()
    forker = in_thread(fork)
    while not registry._forking:
        time.sleep(0.001)
    late = in_thread(second_call)
    leave.set()
    for thread in (caller, forker, late):
        thread.join(60)
    assert events == ["first call ends", "fork", "second call"]


def test_a_call_within_a_call_passes_a_waiting_fork() -> None:
    registry = Connections(quiet)
    with registry.call():
        forker = in_thread(registry.before_fork)
        while not registry._forking:
            time.sleep(0.001)
        with registry.call():
            pass
    forker.join(60)
    assert not forker.is_alive()


def test_the_child_starts_anew() -> None:
    registry = Connections(quiet)
    with registry.call():
        registry.channel("a", Channel)
    registry.before_fork()
    registry.after_fork_in_child()
    with registry.call():
        assert not registry.channel("a", Channel).closed


FOREIGN = {"17": "event_engine"}


def forked(registry: Connections) -> None:
    registry.before_fork()
    registry.after_fork_in_child()


def test_a_child_that_would_hang_is_told_so() -> None:
    """F29: gRPC of somebody else lives in the parent; its child's calls would never end."""
    registry = Connections(lambda: FOREIGN, works=lambda: False)
    forked(registry)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"event_engine.*spawn or forkserver"), registry.call():
            pass
    registry._threads = quiet
    forked(registry)  # its own children are no better off
    with pytest.raises(ConfigurationError, match="event_engine"), registry.call():
        pass


def test_another_copy_of_grpc_does_no_harm() -> None:
    tried: list[bool] = []

    def works() -> bool:
        tried.append(True)
        return True

    registry = Connections(lambda: FOREIGN, works)
    forked(registry)
    for _ in range(2):
        with registry.call():
            pass
    assert tried == [True]


def test_a_fork_waits_for_any_grpc_that_is_shutting_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREAD_WAIT_S", 60.0)
    threads = {"17": "event_engine", "18": "grpc_shutdown"}
    registry = Connections(lambda: dict(threads), works=lambda: True)
    forker = in_thread(registry.before_fork)
    forker.join(0.05)
    assert forker.is_alive()
    del threads["18"]
    forker.join(60)
    assert not forker.is_alive()


class Tasks:
    """Of a process: the last of gRPC's ends while it is looked at, and has started the one that shuts gRPC down."""

    def __init__(self) -> None:
        self.names = {"1": "python", "2": "event_engine"}

    def is_dir(self) -> bool:
        return True

    def iterdir(self) -> list[Task]:
        return [Task(self, task) for task in self.names]


class Task:
    def __init__(self, tasks: Tasks, name: str) -> None:
        self._tasks = tasks
        self.name = name

    def __truediv__(self, file: str) -> Task:
        assert file == "comm"
        return self

    def read_text(self) -> str:
        if self.name == "2":
            self._tasks.names = {"1": "python", "3": "grpc_shutdown"}
            raise FileNotFoundError
        return self._tasks.names[self.name] + "\n"


def test_a_thread_that_starts_while_threads_are_looked_at_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the lock of grpc_init: a child forked then hung at its first call, one of 200 on a busy machine."""
    monkeypatch.setattr(module, "_TASKS", Tasks())
    assert module.grpc_threads() == {"3": "grpc_shutdown"}


def test_a_fork_waits_for_its_own_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREAD_WAIT_S", 60.0)
    threads = dict(FOREIGN)
    registry = Connections(lambda: dict(threads), works=lambda: True)
    with registry.call():
        registry.channel("a", Channel)
    threads["18"] = "event_engine"
    forker = in_thread(registry.before_fork)
    forker.join(0.05)
    assert forker.is_alive()
    del threads["18"]
    forker.join(60)
    assert not forker.is_alive()


def test_a_fork_waits_for_the_threads_of_channels_that_were_closed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that is away: its channel is dropped, another is opened and dropped, and gRPC is still at work."""
    monkeypatch.setattr(module, "THREAD_WAIT_S", 60.0)
    threads: dict[str, str] = {}
    registry = Connections(lambda: dict(threads), works=lambda: True)
    for key in ("a", "b"):
        with registry.call():
            registry.channel(key, Channel)
        threads["17"] = "event_engine"
        registry.drop(key)
    forker = in_thread(registry.before_fork)
    forker.join(0.05)
    assert forker.is_alive()
    threads.clear()
    forker.join(60)
    assert not forker.is_alive()


def test_what_outlives_one_wait_is_not_waited_for_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC of somebody else who came after us: its threads can't be told from ours."""
    monkeypatch.setattr(module, "THREAD_WAIT_S", 0.02)
    monkeypatch.setattr(module, "_SHORT_WAIT_S", 0.01)
    threads: dict[str, str] = {}
    registry = Connections(lambda: dict(threads), works=lambda: True)
    with registry.call():
        registry.channel("a", Channel)
    threads["17"] = "event_engine"
    registry.before_fork()
    assert registry._left == ["event_engine"]
    assert registry._patience_s == 0.01
    registry.after_fork_in_parent()
    threads.clear()
    registry.before_fork()
    assert registry._left == []
    assert registry._patience_s == 0.02


def test_a_call_that_does_not_end_does_not_hold_the_fork_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CALL_WAIT_S", 0.01)
    registry = Connections(quiet)
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with registry.call():
            entered.set()
            leave.wait()

    caller = in_thread(call)
    entered.wait()
    registry.before_fork()
    registry.after_fork_in_parent()
    assert "calls were in flight" in caplog.text
    with registry.call():
        pass  # the parent goes on
    leave.set()
    caller.join(60)
    registry.after_fork_in_child()
    with pytest.raises(ConfigurationError, match="calls in flight"), registry.call():
        pass
