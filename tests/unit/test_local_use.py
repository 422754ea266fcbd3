"""Reports of what was read locally: never in a reader's way, and nothing is lost that could be told later."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import cast

import pytest

from torchcache.errors import ServerUnavailable
from torchcache.lanes import local_unsaid, local_use
from torchcache.lanes.local_store import LocalStore
from torchcache.lanes.local_use import UseReports
from torchcache.wire.v1 import cache_pb2


class Store:
    """Stands for the mapped store: which namespaces were read is what the test says."""

    path = "/store"

    def __init__(self) -> None:
        self.count = 0
        self.names = {"a"}
        self.asked: list[int] = []

    def used_since(self, count: int) -> set[str]:
        self.asked.append(count)
        return self.names


class Server:
    """Takes reports; while `down` it can't be reached, while `hangs` it doesn't answer."""

    def __init__(self) -> None:
        self.reports: list[cache_pb2.ReportUseRequest] = []
        self.down = False
        self.answers = threading.Event()
        self.answers.set()
        self.called = threading.Semaphore(0)

    def __call__(self, request: cache_pb2.ReportUseRequest, deadline: float) -> None:
        self.called.release()
        assert self.answers.wait(60)
        if self.down:
            raise ServerUnavailable("it is down")
        self.reports.append(request)

    def told(self) -> tuple[int, int]:
        return sum(r.chunks for r in self.reports), sum(r.bytes for r in self.reports)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def reports(store: Store, server: Server, monkeypatch: pytest.MonkeyPatch) -> UseReports:
    """Due when the test says so, however long it takes."""
    monkeypatch.setattr(local_use, "EVERY_S", 3600.0)
    monkeypatch.setattr(local_use, "CALL_S", 60.0)
    monkeypatch.setattr(
        local_unsaid, "Finalize", lambda *_, **__: None
    )  # nothing is left for the tests' own end
    monkeypatch.setattr(local_unsaid, "at_exit", local_unsaid.Leaving())
    return UseReports(cast(LocalStore, store), server)


def test_closing_tells_all_that_was_read(reports: UseReports, server: Server) -> None:
    reports.add(3, 5, 1000)
    reports.add(1, 1, 24)
    assert not server.reports, "none is due"
    reports.close()
    assert server.told() == (6, 1024)
    assert (reports.extents, reports.bytes) == (4, 1024)
    assert list(server.reports[0].namespaces) == ["a"]


def test_nothing_read_is_nothing_told(reports: UseReports, server: Server) -> None:
    reports.close()
    assert not server.reports


def test_what_could_not_be_told_is_told_later(reports: UseReports, server: Server, store: Store) -> None:
    server.down = True
    store.count = 7
    reports.add(1, 1, 10)
    reports.close()
    assert not server.reports
    server.down = False
    reports.add(1, 1, 20)
    store.count = 9
    reports.close()
    assert server.told() == (2, 30)
    reports.add(1, 1, 1)
    reports.close()
    assert {0, 9} == {*store.asked}, "names that were not told of are asked for again"
    assert [list(report.namespaces) for report in server.reports] == [["a"], ["a"]]


def test_a_server_that_hangs_stops_no_reader(
    reports: UseReports, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it gets one report at a time."""
    monkeypatch.setattr(local_use, "EVERY_S", 0.0)
    reports._due_s = 0.0
    server.answers.clear()
    for _ in range(50):
        reports.add(1, 1, 1)
    assert server.called.acquire(timeout=60)
    assert not server.called.acquire(blocking=False)
    server.answers.set()
    reports.close()
    assert server.told() == (50, 50)


def test_of_very_many_namespaces_as_many_are_named_as_a_server_takes(
    reports: UseReports, server: Server, store: Store
) -> None:
    store.names = {f"n{number}" for number in range(2 * local_unsaid.MAX_NAMESPACES)}
    reports.add(1, 1, 1)
    reports.close()
    assert len(server.reports[0].namespaces) == local_unsaid.MAX_NAMESPACES


def test_what_is_left_is_told_at_the_end_also_of_a_lane_that_is_gone(store: Store, server: Server) -> None:
    finalizers: list[tuple[Callable[[], object], int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            local_unsaid, "Finalize", lambda _, tell, exitpriority: finalizers.append((tell, exitpriority))
        )
        leaving = local_unsaid.Leaving()
        patch.setattr(local_unsaid, "at_exit", leaving)
        passing = Store()
        UseReports(cast(LocalStore, passing), server).add(1, 2, 30)
        del passing
        UseReports(cast(LocalStore, store), server).add(1, 1, 4)
    [(tell, priority)] = finalizers
    assert priority >= 0, "before a worker is joined"
    tell()
    assert server.told() == (3, 34)
    assert [list(report.namespaces) for report in server.reports] == [["a"], ["a"]]
    tell()
    assert len(server.reports) == 2, "it has been told"


@pytest.mark.parametrize("error", [ServerUnavailable("it is down"), RuntimeError("no new thread")])
def test_servers_that_are_away_delay_the_end_together_by_half_a_second(
    reports: UseReports, store: Store, error: Exception
) -> None:
    deadlines: list[float] = []

    def away(_: object, deadline: float) -> None:
        deadlines.append(deadline)
        raise error

    others = [UseReports(cast(LocalStore, store), away) for _ in range(3)]
    for one in others:
        one.add(1, 1, 1)
    before = time.monotonic()
    local_unsaid.at_exit.tell()
    assert len(deadlines) == 3
    assert {*deadlines} == {deadlines[0]}
    assert before < deadlines[0] <= time.monotonic() + local_unsaid.EXIT_S


def test_a_report_that_hangs_is_not_waited_for_at_the_end(
    reports: UseReports, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_unsaid, "EXIT_S", 0.0)
    reports.add(1, 1, 1)
    with reports._sending:
        local_unsaid.at_exit.tell()
    assert not server.reports


def test_a_forked_child_tells_nothing_of_its_parents(reports: UseReports, server: Server) -> None:
    reports.add(1, 1, 1)
    local_unsaid.at_exit.begin()  # as a fork's child does
    local_unsaid.at_exit.tell()
    assert not server.reports


@pytest.mark.forks
def test_a_child_that_was_forked_amid_other_threads_reads_is_not_held_up(
    reports: UseReports, server: Server
) -> None:
    reports.add(1, 1, 1)
    with reports._lock, reports._unsaid._lock, reports._sending:  # as threads that the child hasn't
        child = os.fork()
        if not child:
            signal.alarm(60)
            reports.add(2, 2, 20)
            reports.close()
            os._exit(0 if server.told() == (2, 20) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    reports.close()
    assert server.told() == (1, 1), "what the parent read is the parent's to tell"


def test_at_the_interpreters_end_no_thread_is_started(
    reports: UseReports, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    reports._due_s = 0.0
    reports.add(1, 1, 1)
    reports.close()
    assert server.told() == (1, 1)
