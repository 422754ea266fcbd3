"""`torchcache status --watch` for people: on a terminal, in a pipe, and what it says of checkpoints and datasets."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.memory_pool import MemoryPool
from tests.waiting import until
from torchcache.cli.app import run
from torchcache.cli.recent_saves import ASKED_AT_ONCE, NEWEST, RecentSaves
from torchcache.cli.residencies import MOST_DATASETS
from torchcache.errors import ObjectNotFound, ServerUnavailable
from torchcache.model import ObjectId
from torchcache.pool import SaveInfo
from torchcache.save_names import put_namespace, save_namespace, split_save_namespace

NOW = 100_000.0
UP = "\x1b[1A"
"""The terminal's cursor goes up a line: what follows is written over what was there."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> MemoryPool:
    pool = MemoryPool()
    monkeypatch.setattr("torchcache.cli.command.Session.pool", pool)
    monkeypatch.setattr("torchcache.cli.recent_saves.time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setattr("torchcache.cli.recent_saves.WAIT_S", 60.0)
    monkeypatch.setenv("TORCHCACHE_POOL", "127.0.0.1:7440")
    return pool


def save(
    pool: MemoryPool, step: int, state: Any, *, ago_s: float = 0.0, part: str = "", held: int = 1000
) -> None:
    """One at run/step-<step>, of which the server holds so many bytes."""
    pool.hold(f"save:s3/b/run/step-{step}@id{step}", held, dirty=state != "durable")
    pool.saved["s3", f"b/run/step-{step}", part] = SaveInfo(
        store="s3",
        path=f"b/run/step-{step}",
        part=part,
        save_id=f"id{step}",
        state=state,
        manifest=b"",
        pending_bytes=700 if state == "committed" else 0,
        total_bytes=2000 if state != "reserved" else 0,
        error=ServerUnavailable("no way to S3") if state == "failed" else None,
        committed_unix_s=NOW - ago_s if state != "reserved" else 0.0,
        durable_unix_s=0.0,
        replicas=2 if state == "committed" else 1,
    )


def recent(pool: MemoryPool, *, wait_s: float = 60.0) -> RecentSaves:
    return RecentSaves(pool, wait_s=wait_s)


# ---- checkpoints ----


def test_names_of_saves_are_taken_apart() -> None:
    assert split_save_namespace(save_namespace("s3", "b/a@b/step-1", "id")) == ("s3", "b/a@b/step-1", "id")
    for other in (
        "s3://b/data@1",
        put_namespace(ObjectId("s3", "b/x", "save:1")),
        "samples:x@0",
        "save:",
        "save:a@b",
    ):
        assert split_save_namespace(other) is None


def test_the_newest_checkpoints_come_first_with_how_far_they_are(pool: MemoryPool) -> None:
    save(pool, 1, "durable", ago_s=300.0)
    save(pool, 2, "committed", ago_s=200.0)
    save(pool, 3, "failed", ago_s=100.0, part="__0")
    save(pool, 4, "reserved", held=50)
    pool.hold("s3://b/data", 5)
    found = recent(pool).of(pool.status())
    assert [(one.uri, one.part, one.state, one.bytes, one.pending_bytes, one.age_s) for one in found] == [
        ("s3://b/run/step-4", "", "saving", 50, 0, None),
        ("s3://b/run/step-3", "__0", "failed", 2000, 0, 100.0),
        ("s3://b/run/step-2", "", "replicated", 2000, 700, 200.0),
        ("s3://b/run/step-1", "", "durable", 2000, 0, 300.0),
    ]
    assert "no way to S3" in found[1].error


def test_a_server_that_has_not_all_yet_counts_as_one_that_holds_some(pool: MemoryPool) -> None:
    save(pool, 1, "committed")
    [server] = pool.status()
    half = [dataclasses.replace(one, bytes=500, dirty=False) for one in server.namespaces]
    other = dataclasses.replace(server, server_id="other", namespaces=tuple(half))
    pool.saved.clear()
    [found] = recent(pool).of([server, other])
    assert (found.state, found.bytes, found.servers, found.age_s) == ("not durable", 1000, 2, None)


def test_only_the_newest_are_shown_and_what_is_durable_is_asked_about_once(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = ASKED_AT_ONCE + 5
    for step in range(1, count):
        save(pool, step, "durable", ago_s=1000.0 - step)
    save(pool, count, "committed", ago_s=1.0)
    asked: list[str] = []
    ask = pool.list_saves

    def list_saves(uri: str) -> list[SaveInfo]:
        asked.append(uri)
        return ask(uri)

    monkeypatch.setattr(pool, "list_saves", list_saves)
    saves = recent(pool)
    for look in range(1, 4):
        found = saves.of(pool.status())
        assert asked.count(f"s3://b/run/step-{count}") == look, (
            "first of all, and again: storage hasn't got it yet"
        )
        assert found[0].uri.endswith(f"step-{count}")
    assert len(asked) == count - 1 + 3
    steps = [int(one.uri.rpartition("-")[2]) for one in found]
    assert steps == list(range(count, count - NEWEST, -1))


def test_what_was_overwritten_or_dropped_is_not_shown(pool: MemoryPool) -> None:
    save(pool, 1, "durable")
    save(pool, 2, "durable")
    pool.hold("save:s3/b/run/step-1@older", 1000)
    saves = recent(pool)
    assert len(saves.of(pool.status())) == 2
    del pool.namespaces["save:s3/b/run/step-2@id2"]
    [left] = saves.of(pool.status())
    assert left.uri == "s3://b/run/step-1"


def test_storage_that_is_away_keeps_nobody_from_watching(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a thread of its own, and again once that has ended with an error."""
    save(pool, 1, "committed")
    away, ask, asked = threading.Event(), pool.list_saves, []

    def list_saves(uri: str) -> list[SaveInfo]:
        asked.append(uri)
        if len(asked) == 1:
            away.wait(60)
            raise ServerUnavailable("storage is away")
        return ask(uri)

    monkeypatch.setattr(pool, "list_saves", list_saves)
    saves = recent(pool, wait_s=0.0)
    for _ in range(2):
        assert [one.state for one in saves.of(pool.status())] == ["not durable"]
    assert len(asked) == 1
    away.set()
    until(lambda: [one.state for one in saves.of(pool.status())] == ["replicated"])


def test_a_checkpoint_whose_bucket_is_gone_is_told_by_what_is_held(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(pool, 1, "committed")

    def list_saves(uri: str) -> list[SaveInfo]:
        raise ObjectNotFound("no bucket b")

    monkeypatch.setattr(pool, "list_saves", list_saves)
    assert [one.state for one in recent(pool).of(pool.status())] == ["not durable"]


# ---- looks ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def large_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """It is stdout, from now on."""
    for name, value in {"COLUMNS": "200", "LINES": "100", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def look_at(monkeypatch: pytest.MonkeyPatch, pool: MemoryPool, *looks: Callable[[], Any] | None) -> None:
    """One look after the other, each behind what is called; None: the pool is away. Then Ctrl-C."""
    left: Iterator[Callable[[], Any] | None] = iter(looks)
    status = pool.status

    def look() -> Any:
        try:
            prepare = next(left)
        except StopIteration:
            raise KeyboardInterrupt from None
        if prepare is None:
            raise ServerUnavailable("it is away")
        prepare()
        return status()

    monkeypatch.setattr(pool, "status", look)
    monkeypatch.setattr("torchcache.cli.watching.sleep", lambda seconds: None)


def test_a_look_takes_the_place_of_the_one_before(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = large_terminal(monkeypatch)
    save(pool, 1, "committed", ago_s=90.0)
    pool.hold("s3://b/data", 5_000_000)
    look_at(monkeypatch, pool, lambda: None, lambda: save(pool, 1, "durable", ago_s=95.0))
    assert run(["status", "--watch", "1"]) == 130
    first, *_, last = terminal.getvalue().split(UP)
    assert (
        "replicated" in first and "1 min 30 s" in first and "durable" not in first.replace("not durable", "")
    )
    for told in (
        "1 server answers",
        "127.0.0.1:7440",
        "s3://b/run/step-1",
        "durable",
        "1 min 35 s",
        "s3://b/data",
        "5.0 MB",
    ):
        assert told in last, told
    assert "replicated" not in last.partition("newest checkpoints")[2].partition("checkpoints at")[0]
    assert "hit rate" in last, "rates"


def test_a_pool_that_is_away_is_said_above_what_was_seen_last(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = large_terminal(monkeypatch)
    look_at(monkeypatch, pool, lambda: None, None, None, lambda: None)
    assert run(["status", "--watch", "1"]) == 130
    looks = [part for part in terminal.getvalue().split(UP) if part.strip()]
    away = [part for part in looks if "it is away" in part]
    assert len(away) == 2
    assert all("127.0.0.1:7440" in part for part in away), "with what was seen last"
    assert "it is away" not in looks[-1]
    assert "127.0.0.1:7440" in looks[-1]
    assert "away" not in capsys.readouterr().err


def test_a_pool_that_is_away_at_first_is_waited_for(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = large_terminal(monkeypatch)
    look_at(monkeypatch, pool, None, lambda: None)
    assert run(["status", "--watch", "1"]) == 130
    text = terminal.getvalue()
    assert text.index("it is away") < text.index("127.0.0.1:7440")


def test_in_a_pipe_looks_are_printed_one_below_the_other(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, 1, "committed", ago_s=90.0)
    look_at(monkeypatch, pool, lambda: None, None, lambda: None)
    assert run(["status", "--watch", "1"]) == 130
    out, err = capsys.readouterr()
    assert out.count("1 server answers") == out.count("newest checkpoints") == 2
    assert "\x1b" not in out
    assert "it is away" in err


def test_for_machines_the_newest_checkpoints_are_beside_the_rest(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, 1, "committed", ago_s=90.0)
    look_at(monkeypatch, pool, lambda: None)
    assert run(["status", "--watch", "1", "--json"]) == 130
    [found] = json.loads(capsys.readouterr().out)["checkpoints"]
    assert found == {
        "uri": "s3://b/run/step-1",
        "part": "",
        "state": "replicated",
        "bytes": 2000,
        "pending_bytes": 700,
        "servers": 1,
        "age_s": 90.0,
        "error": "",
    }


# ---- datasets ----


@pytest.mark.parametrize(
    ("residency", "said"), [([], ["2.0 kB", "-", "-"]), (["--residency"], ["2.0 kB", "4.0 kB", "25 %"])]
)
def test_datasets_are_told_with_how_much_of_them_is_resident(
    pool: MemoryPool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    residency: list[str],
    said: list[str],
) -> None:
    """Of two servers together; of how much only where storage is listed."""
    pool.put("s3://b/data/a", b"." * 1000)
    pool.put("s3://b/data/b", b"." * 3000)
    pool.resident.add(pool.stat("s3://b/data/a").id)
    pool.hold("s3://b/data", 1000)
    pool.hold("s3://gone/x", 10)
    for number in range(MOST_DATASETS - 1):
        pool.hold(f"samples:{number:02}@0", 5)
    [one] = pool.status()
    other = dataclasses.replace(one, server_id="other", instance="2")
    monkeypatch.setattr(pool, "status", lambda: [one, other])
    look_at(monkeypatch, pool, lambda: None)
    assert run(["status", "--watch", "1", *residency]) == 130
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "s3://b/data" in line]
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == ["s3://b/data", "2", *said]
    assert ("no bucket gone" in out) is bool(residency)
    assert "and 1 datasets that hold less" in out
