"""The command's behaviour over a pool in memory: exit codes, JSON, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.memory_pool import MemoryPool
from torchcache.checkpoint.layout import GRANULE_BYTES
from torchcache.checkpoint.manifest import Item, Manifest, frame_digest, payload_digests
from torchcache.checkpoint.verification import PIECE_BYTES
from torchcache.cli.app import run
from torchcache.cli.durations import parse_duration
from torchcache.cli.output import duration_text, percent_text, size_text
from torchcache.cli.residencies import Residencies
from torchcache.errors import (
    AlreadyExists,
    DeadlineExceeded,
    IntegrityError,
    ObjectNotFound,
    OutOfSpace,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.model import ObjectId, ObjectInfo
from torchcache.pool import CopiesStatus, PassedOver, SaveInfo
from torchcache.pool.reports import OrderStatus

RUN = "s3://b/run/step-1"


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> MemoryPool:
    pool = MemoryPool()
    for key, size in [("data/a", 1000), ("data/x/1", 500), ("data/x/2", 1500), ("top", 10)]:
        pool.put(f"s3://b/{key}", b"." * size)
    monkeypatch.setattr("torchcache.cli.command.Session.pool", pool)
    monkeypatch.setenv("TORCHCACHE_POOL", "127.0.0.1:7440")
    return pool


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


# ---- all commands ----


def test_help_and_version_come_without_the_heavy_imports() -> None:
    script = (
        "import sys; from torchcache.cli.app import run; assert run(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'grpc', 'pyarrow', 'boto3', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["--version"], ["checkpoint", "verify", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize(
    "words",
    [
        *([], ["status"], ["stage"], ["ls"], ["pin"], ["unpin"], ["evict"], ["limit"]),
        *(["checkpoint", "ls"], ["checkpoint", "verify"], ["doctor"]),
    ],
)
def test_every_help_tells_the_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done" in text
    assert "2 wrong usage" in text
    assert "3 no pool runs" in text
    if words:
        assert not [kind for kind in ("HOST:PORT", "unix:///", "etcd://", "dns://") if kind not in text]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ObjectNotFound("there is no such thing"), 1),
        (OutOfSpace("full"), 1),
        (TorchCacheError("other"), 1),
        (ServerUnavailable("gone", server="127.0.0.1:7440"), 3),
        (Overloaded("busy"), 3),
    ],
)
def test_errors_are_one_line_and_a_code(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], error: TorchCacheError, code: int
) -> None:
    def fail() -> None:
        raise error

    pool.status = fail  # type: ignore[method-assign, assignment]
    assert run(["status"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"torchcache: {error}\n"
    assert run_json(capsys, "status", code=code)["error"] == type(error).__name__


def test_status_names_the_servers_that_do_not_answer(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "unreachable", lambda: ["h:1"])
    assert run_json(capsys, "status")["unreachable"] == ["h:1"]
    assert run(["status"]) == 0
    assert "the server h:1 can't be reached" in capsys.readouterr().err


@pytest.mark.parametrize("later", ["answers_s", "list_in_any_order"])
def test_status_names_a_server_that_answers_again_meanwhile(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    """It isn't among those that said how they are, and isn't to be missing without a word."""
    pool.hold("s3://b/data", 5)
    away, asked = ["h:1"], getattr(pool, later)

    def ask(*arguments: Any) -> Any:
        away.clear()
        return asked(*arguments)

    monkeypatch.setattr(pool, "unreachable", lambda: list(away))
    monkeypatch.setattr(pool, later, ask)
    assert run_json(capsys, "status", "--residency")["unreachable"] == ["h:1"]
    assert not away


def test_status_names_a_server_that_is_far_slower_than_the_others(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "1.2 ms" in (run(["status"]) or capsys.readouterr().out)
    times = {"h:1": 0.001, "h:2": 0.104, "h:3": 0.001, "h:4": None}
    monkeypatch.setattr(pool, "answers_s", lambda: times)
    document = run_json(capsys, "status")
    assert document["answers_s"] == times
    assert list(document["slow"]) == ["h:2"]
    assert run(["status"]) == 0
    assert "the server h:2 takes 104 times as long as the others" in capsys.readouterr().err


def test_status_names_a_server_that_clients_pass_over(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        PassedOver(server_id="f00", reason="slow", clients=3),
        PassedOver(server_id="e", reason="new", clients=1),
    ]
    pool.disk = {"passed_over": tuple(said)}
    assert run(["status"]) == 0
    err = capsys.readouterr().err
    assert "the server 127.0.0.1:7440 is passed over by 3 clients: it is far slower than the others" in err
    assert "the server e is passed over by 1 clients: new" in err
    assert run_json(capsys, "status")["passed_over"] == [
        {"server": "127.0.0.1:7440", "reason": "slow", "clients": 3},
        {"server": "e", "reason": "new", "clients": 1},
    ]


def test_status_shows_the_orders_of_reading_that_were_told(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    order = OrderStatus(
        namespace="s3://b/data",
        order="0123456789",
        epoch=2,
        position=30,
        length=4000,
        chunks=500,
        ahead_bytes=7_000_000,
        coming_chunks=8,
        fetched_bytes=9_000_000,
        left_s=60.0,
    )
    pool.disk = {"orders": (order, dataclasses.replace(order, order="f", position=-1))}
    assert run(["status"]) == 0
    out = capsys.readouterr().out
    for part in ("read by order", "30 of 4,000", "not begun", "7.0 MB", "9.0 MB", "01234567"):
        assert part in out


def test_status_says_what_did_not_fit_into_an_answer(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.disk = {"namespaces_left_out": 1234, "orders_left_out": 5}
    assert run(["status"]) == 0
    err = capsys.readouterr().err
    assert "1,234 datasets that hold the least at the server 127.0.0.1:7440 are not shown" in err
    assert "5 orders of reading at the server 127.0.0.1:7440 are not shown" in err
    assert run_json(capsys, "status")["servers"][0]["namespaces_left_out"] == 1234


def test_status_shows_the_lane_to_each_server_and_what_was_read_by_it(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "flight" in line and "far" in line]
    assert line.split()[1:6] == ["flight", "6.0", "GB", "5.0", "GB"]
    document = run_json(capsys, "status")
    assert document["lanes"] == {"127.0.0.1:7440": "flight"}
    assert document["lane_reasons"] == {"127.0.0.1:7440": "it is far away"}


def test_configuration_errors_are_code_2(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", "gs://bucket/x"]) == 2
    assert capsys.readouterr().err == "torchcache: no under-store for gs://bucket/x/\n"
    for words in (["ls", ""], ["stage", ""], ["stage", " "]):
        assert run(words) == 2
        assert "the URI is empty" in capsys.readouterr().err


def test_wrong_usage_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stage"]) == 2
    assert "Missing argument 'URI'" in capsys.readouterr().err
    assert run(["stag", "s3://b"]) == 2
    assert "No such command 'stag'" in capsys.readouterr().err


def test_a_bug_is_one_line_too(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.status = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]
    assert run(["status"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("torchcache: unexpected ZeroDivisionError")
    assert err.count("\n") == 1
    assert run(["--traceback", "status"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_code_130(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    pool.status = interrupt  # type: ignore[method-assign, assignment]
    assert run(["status"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")


# ---- status, ls, stage ----


def test_status_shows_servers_and_under_stores(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    out = capsys.readouterr().out
    for part in ("127.0.0.1:7440", "1 h 1 min", "25.0 GB", "100.0 GB", "90 %", "1.5 MB", "s3://", "7.0 MB"):
        assert part in out
    [server] = run_json(capsys, "status")["servers"]
    assert server["capacity_bytes"] == 100_000_000_000
    assert server["under_stores"][0]["read_requests"] == 7


def test_watched_status_shows_what_happens_meanwhile(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at while it is away once, and starts anew: rates are of what came since the last look that was answered.

    Another joins that has long been there, is away at the next look, and back at the one after.
    """
    [first] = pool.status()
    later = dataclasses.replace(
        first,
        served_bytes=first.served_bytes + 6000,
        local_bytes=first.local_bytes + 2000,
        hits=first.hits + 3,
        hedged_calls=first.hedged_calls + 5,
    )
    restarted = dataclasses.replace(later, instance="another", served_bytes=500, uptime_s=1.0)
    joins = dataclasses.replace(first, instance="other", served_bytes=36610)
    back = dataclasses.replace(joins, served_bytes=joins.served_bytes + 4000, uptime_s=joins.uptime_s + 4)
    looks = iter([[first], [later], None, [restarted], [restarted, joins], [restarted], [restarted, back]])
    clock = iter([0.0, 2.0, 4.0, 6.0, 8.0, 10.0])

    def look() -> list[Any]:
        found = next(looks, KeyboardInterrupt)
        if found is KeyboardInterrupt:
            raise KeyboardInterrupt
        if found is None:
            raise ServerUnavailable("it is away")
        return found  # type: ignore[return-value]

    monkeypatch.setattr(pool, "status", look)
    monkeypatch.setattr("torchcache.cli.watching.monotonic", lambda: next(clock))
    monkeypatch.setattr("torchcache.cli.watching.sleep", lambda seconds: None)
    assert run(["status", "--json", "--watch", "0.5"]) == 130
    printed = capsys.readouterr()
    assert "it is away" in printed.err
    documents = [json.loads(line) for line in printed.out.splitlines()]
    found = [[rate["flight_bytes"] for rate in document.get("rates", [])] for document in documents]
    assert found == [[], [3000], [250], [0, 10], [0], [0, 1000]]
    [rate] = documents[1]["rates"]
    assert (rate["local_bytes"], rate["hit_rate"], rate["hedged_calls"]) == (1000, 1.0, 2.5)


def test_status_shows_how_much_of_datasets_is_held(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3,000 bytes in three objects the first, of 1,000."""
    monkeypatch.setattr("torchcache.cli.residencies.ASKED_AT_ONCE", 2)
    pool.resident.add(pool.stat("s3://b/data/a").id)
    for name in ("s3://b/data", "s3://gone/x", "samples:computed@0"):
        pool.hold(name, 5)
    assert "residency" not in run_json(capsys, "status")
    found, gone = run_json(capsys, "status", "--residency")["residency"]
    assert found == {
        "name": "s3://b/data",
        "objects": 3,
        "bytes": 3000,
        "resident_bytes": 1000,
        "error": "",
        "fraction": 1000 / 3000,
    }
    assert (gone["name"], gone["fraction"]) == ("s3://gone/x", None)
    assert "no bucket gone" in gone["error"]
    assert run(["status", "--residency"]) == 0
    _, said = capsys.readouterr().out.split("dataset in storage")
    [line] = [line for line in said.splitlines() if "s3://b/data" in line]
    assert line.split() == ["s3://b/data", "3", "3.0", "kB", "1.0", "kB", "33", "%"]


def test_residency_waits_for_a_server_that_hangs_only_once(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What storage says of one dataset ends nothing, though: the others are asked for."""
    for name in ("s3://b/data", "s3://b/more", "s3://b/top", "s3://a/gone"):
        pool.hold(name, 5)
    asked: list[str] = []

    def resident_bytes(objects: Sequence[ObjectInfo]) -> list[int]:
        asked.append(objects[0].id.key)
        raise DeadlineExceeded("no answer within 30 s")

    monkeypatch.setattr(pool, "resident_bytes", resident_bytes)
    found = Residencies(pool).of(pool.status())
    assert [one.name for one in found] == ["s3://a/gone", "s3://b/data", "s3://b/more", "s3://b/top"]
    assert asked == ["b/data/a"]
    assert "no bucket" in found[0].error
    assert all("no answer within 30 s" in one.error for one in found[1:])


def test_watched_residency_is_kept_by_what_it_costs(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed from 0 to 1 s, it is good until 21 s."""
    pool.hold("s3://b/data", 5)
    clock = iter([0.0, 1.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr("torchcache.cli.residencies.monotonic", lambda: next(clock))
    residencies = Residencies(pool)  # type: ignore[arg-type]
    [first] = residencies.of(pool.status())
    pool.resident.add(pool.stat("s3://b/data/a").id)
    assert residencies.of(pool.status()) == [first]
    [later] = residencies.of(pool.status())
    assert (first.resident_bytes, later.resident_bytes) == (0, 1000)


def test_status_shows_the_disk(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    out, err = capsys.readouterr()
    for part in ("in service", "11.0 MB", "12.0 MB", "13.0 MB", "14.0 GB", "18.0 GB", " 19 "):
        assert part in out
    assert err == ""


def test_status_shows_how_far_checkpoints_are(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    assert "checkpoints at" not in capsys.readouterr().out
    pool.disk = {
        "saves": {"saving": 0, "cached": 31, "replicated": 0, "durable": 32, "failed": 33, "copy": 34}
    }
    assert run(["status"]) == 0
    _, said = capsys.readouterr().out.split("checkpoints at")
    [line] = [line for line in said.splitlines() if "127.0.0.1:7440" in line]
    assert line.split()[1:7] == ["0", "31", "0", "32", "33", "34"]
    assert line.split()[9:] == ["-"] * 4, "nothing waits, and it looks after no copies"
    [server] = run_json(capsys, "status")["servers"]
    assert server["saves"]["durable"] == 32
    assert server["copies"] is None


def test_status_shows_copies_and_says_loudly_that_some_are_missing(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """F37. Of what waits for its upload, and for how long."""
    copies = {"wanted": 6, "held": 6, "made": 2, "mended_chunks": 3}
    pool.disk = {"saves": {"replicated": 3}, "oldest_pending_s": 4000.0, "copies": CopiesStatus(**copies)}
    assert run(["status"]) == 0
    out, err = capsys.readouterr()
    assert "1 h 6 min 6 of 6 2 3" in " ".join(out.split())
    assert err == ""
    pool.disk["copies"] = CopiesStatus(**copies | {"held": 5})
    assert run(["status"]) == 0
    out, err = capsys.readouterr()
    assert "5 of 6" in out
    assert err.startswith(
        "torchcache: checkpoints that 127.0.0.1:7440 has yet to upload are to have 6 copies"
    )
    [server] = run_json(capsys, "status")["servers"]
    assert server["oldest_pending_s"] == 4000.0
    assert server["copies"] == copies | {"held": 5}


def test_status_says_loudly_that_a_disk_is_out_of_service(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """F12, F15: what a server goes on without is in the table, on stderr and in the document."""
    pool.disk = {"out_of_service": "pwritev: Input/output error", "disk_errors": 3, "damaged_kept": 2}
    assert run(["status"]) == 0
    out, err = capsys.readouterr()
    assert "out of service: pwritev: Input/output error" in out
    assert err.startswith(
        "torchcache: the disk of the server 127.0.0.1:7440 is out of service: pwritev: Input"
    )
    [server] = run_json(capsys, "status")["servers"]
    assert server["out_of_service"] == "pwritev: Input/output error"
    assert (server["disk_errors"], server["damaged_kept"]) == (3, 2)


def test_status_shows_what_was_asked_of_a_dataset(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.hold("s3://b/data", 5_000_000, dirty=True)
    pool.set_policy("s3://b/data", pinned=True, priority=-3, quota_bytes=10**9, ttl_s=3 * 86400.0)
    assert run(["status"]) == 0
    notes = "pinned, priority -3, quota 1.0 GB, dropped when unused for 3 d 0 h, not yet durable"
    [line] = [line for line in capsys.readouterr().out.splitlines() if "s3://b/data" in line]
    assert line.rstrip().endswith(notes)


def test_ls_sums_folders_and_shows_what_the_pool_holds(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.resident = {pool.stat("s3://b/data/x/2").id}
    pool.put("s3://b/data/", b"")
    pool.put("s3://b/data/marker/", b"")
    assert run_json(capsys, "ls", "s3://b/data") == {
        "uri": "s3://b/data",
        "total": {"name": "total", "objects": 3, "bytes": 3000, "resident_bytes": 1500},
        "entries": [
            {"name": "a", "objects": 1, "bytes": 1000, "resident_bytes": 0},
            {"name": "x/", "objects": 2, "bytes": 2000, "resident_bytes": 1500},
        ],
    }
    recursive = run_json(capsys, "ls", "-r", "s3://b/data/")
    assert [entry["name"] for entry in recursive["entries"]] == ["a", "x/1", "x/2"]
    assert run(["ls", "s3://b/data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "x/" in line] == [["x/", "2", "2.0", "kB", "75", "%"]]
    assert [line.split() for line in lines if "total" in line] == [["total", "3", "3.0", "kB", "50", "%"]]


def test_ls_takes_a_path_of_the_file_system(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.put("file:///data/a", b"1")
    pool.put("file:///data/x/a", b"1")
    listing = run_json(capsys, "ls", "-r", "/data")
    assert [entry["name"] for entry in listing["entries"]] == ["a", "x/a"]
    assert [e["name"] for e in run_json(capsys, "ls", "/data/x/a")["entries"]] == ["a"]


def test_ls_of_an_object_and_of_nothing(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert [e["name"] for e in run_json(capsys, "ls", "s3://b/top")["entries"]] == ["top"]
    assert run(["ls", "s3://b/nothing"]) == 1
    assert capsys.readouterr().err == "torchcache: there is nothing under s3://b/nothing\n"


def test_ls_without_uri_shows_under_stores(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "ls")["under_stores"] == [
        {"name": "file", "uri": "file:///"},
        {"name": "s3", "uri": "s3://"},
    ]


def test_stage_fetches_and_reports(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "stage", "s3://b/data", "--pattern", "x/*")
    assert (report["objects"], report["bytes"], report["resident_bytes_before"]) == (2, 2000, 0)
    assert report["resident_bytes"] == 2000
    assert run(["stage", "s3://b/data"]) == 0
    assert capsys.readouterr().out.startswith("3 objects, 3.0 kB: 1.0 kB fetched in 0.")
    assert len(pool.resident) == 3


def test_long_work_shows_its_progress_on_a_terminal(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(["stage", "s3://b/data"]) == 0
    out, err = capsys.readouterr()
    assert "staging" in err
    assert "3/3" in err
    assert "staging" not in out
    save(pool)
    assert run_json(capsys, "checkpoint", "verify", RUN)["ok"]


def test_stage_reports_the_first_failure_after_all_were_tried(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.errors["s3://b/data/a"] = IntegrityError("bad bytes", object="s3://b/data/a")
    assert run(["stage", "s3://b/data"]) == 1
    out, err = capsys.readouterr()
    assert err == "torchcache: bad bytes (object s3://b/data/a)\n"
    assert "s3://b/data/a" in out
    assert len(pool.resident) == 2
    pool.errors["s3://b/data/x/b"] = IntegrityError("bad bytes", server="node1:7440")
    assert run(["stage", "--json", "s3://b/data"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["missing"][0] == {"uri": "s3://b/data/a", "server": None, "why": "bad bytes"}
    assert run(["stage", "s3://b/data", "--pattern", "*.png"]) == 1
    assert capsys.readouterr().err == "torchcache: there is nothing that matches '*.png' under s3://b/data\n"


def lose_one(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged later has the first object of all go again."""
    stage = pool.stage

    def stage_and_lose_one(objects: Sequence[ObjectInfo], **options: Any) -> None:
        stage(objects, **options)
        pool.resident.discard(objects[0].id)

    monkeypatch.setattr(pool, "stage", stage_and_lose_one)


def test_stage_fails_where_not_all_has_room(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came later made the pool let go of what came before: nothing failed, and yet not all is there."""
    lose_one(pool, monkeypatch)
    assert run(["stage", "s3://b/data"]) == 1
    out, err = capsys.readouterr()
    assert "1,000 of its 1,000 bytes had to go again" in err
    assert "--capacity" in err
    assert "s3://b/data/a" in out
    assert run(["stage", "--json", "s3://b/data"]) == 1
    (missing,) = json.loads(capsys.readouterr().out)["missing"]
    assert (missing["uri"], missing["server"]) == ("s3://b/data/a", "127.0.0.1:7440")


def test_stage_lists_what_failed_and_then_what_had_to_go(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_one(pool, monkeypatch)
    pool.errors["s3://b/data/x/2"] = ObjectNotFound("it is gone", server="node1:7440")
    assert run(["stage", "--json", "s3://b/data"]) == 1
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert [(one["uri"], one["server"]) for one in missing] == [
        ("s3://b/data/x/2", "node1:7440"),
        ("s3://b/data/a", "127.0.0.1:7440"),
    ]
    assert run(["stage", "s3://b/data"]) == 1
    out, err = capsys.readouterr()
    assert "1 missing at node1:7440: it is gone" in err
    assert "1 missing at 127.0.0.1:7440: 1,000 of its 1,000 bytes had to go again" in err
    assert "s3://b/data/a" in out and "s3://b/data/x/2" in out


# ---- pin, unpin, evict, limit ----


@pytest.mark.parametrize("name", ["s3://b/data", "samples:Set-3@0", "samples", "file:///data"])
def test_a_dataset_is_pinned_by_its_name_and_unpinned(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pool.hold(name, 5_000_000)
    uri = {"file:///data": "/data/", "s3://b/data": "s3://b/data/"}.get(name, name)
    assert run(["pin", uri]) == 0
    assert capsys.readouterr().out == f"pinned {uri}: 5.0 MB in the pool stays\n"
    assert pool.namespaces[name].pinned
    [found] = run_json(capsys, "unpin", uri)["namespaces"]
    assert (found["server"], found["name"], found["pinned"]) == ("127.0.0.1:7440", name, False)
    assert list(pool.namespaces) == [name]


def test_what_is_not_in_the_pool_yet_is_pinned_for_when_it_comes(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.put("s3://b/later/a", b"1")
    assert run(["pin", "s3://b/later"]) == 0
    assert capsys.readouterr().out == "pinned s3://b/later: nothing of it is in the pool now\n"
    assert pool.namespaces["s3://b/later"].pinned


@pytest.mark.parametrize(
    "words", [["pin"], ["unpin"], ["evict"], ["limit", "--priority", "1"], ["checkpoint", "ls"]]
)
@pytest.mark.parametrize("uri", ["s3://b/misspelt", "s3://nowhere/x", "/misspelt/"])
def test_what_neither_pool_nor_storage_knows_is_code_1(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], words: list[str], uri: str
) -> None:
    assert run([*words, uri]) == 1
    assert uri.rstrip("/") in capsys.readouterr().err
    assert not pool.namespaces


def test_what_only_storage_or_only_the_pool_has_is_known(pool: MemoryPool) -> None:
    pool.hold("s3://b/gone", 5)
    for uri in ("s3://b/gone", "s3://b/data/", "s3://b/top", "s3://b", "samples:any@0"):
        assert run(["evict", uri]) == 0


def test_a_checkpoint_is_pinned_with_its_copy_in_the_pool(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """I6. Not the copies of others whose paths begin the same."""
    others = ["save:s3/b/run/step-10@x", "save:s3/b/run/step-1@2/deeper@y", "save:file/b/run/step-1@x"]
    for name in ("save:s3/b/run/step-1@id1", "save:s3/b/run/step-1@id2", *others):
        pool.hold(name, 7)
    done = run_json(capsys, "pin", RUN)
    names = [RUN, "save:s3/b/run/step-1@id1", "save:s3/b/run/step-1@id2"]
    assert [n["name"] for n in done["namespaces"]] == names
    assert [name for name, found in pool.namespaces.items() if found.pinned] == [*names[1:], RUN]
    assert run(["limit", RUN, "--priority", "2"]) == 2
    assert "is a checkpoint: it can be pinned or evicted" in capsys.readouterr().err


def test_a_save_that_is_not_there_is_not_pinned(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pin", "save:s3/b/run@gone"]) == 1
    assert "the pool holds nothing named save:s3/b/run@gone" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pin"], ["unpin"], ["evict"], ["limit", "--priority", "1"]])
def test_nothing_is_changed_while_a_server_does_not_say_what_it_holds(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """A copy of the checkpoint may lie there alone."""
    pool.hold(RUN, 5)
    before = dict(pool.namespaces)
    monkeypatch.setattr(pool, "unreachable", lambda: ["h:1", "h:2"])
    assert run([*words, RUN]) == 3
    assert (
        f"h:1, h:2 can't be reached, so it can't be told what lies there of {RUN}" in capsys.readouterr().err
    )
    assert pool.namespaces == before


def test_evict_frees_and_says_how_much(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.hold("s3://b/data", 5_000_000)
    assert run(["evict", "s3://b/data"]) == 0
    assert capsys.readouterr().out == "evicted s3://b/data: 5.0 MB freed\n"
    assert run_json(capsys, "evict", "s3://b/data")["freed_bytes"] == 0
    assert run(["evict", "s3://b/data"]) == 0
    assert capsys.readouterr().out == "the pool held nothing of s3://b/data\n"


def test_evict_takes_nothing_of_a_checkpoint_that_is_not_durable(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """I6."""
    pool.hold(RUN, 5)
    pool.hold("save:s3/b/run/step-1@id1", 7, dirty=True)
    assert run(["evict", RUN]) == 2
    assert "not yet durable" in capsys.readouterr().err
    assert pool.namespaces[RUN].bytes == 5


def test_limits_are_set_and_taken_away(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["limit", "s3://b/data"]
    assert run([*limit, "--quota", "100GB", "--ttl", "7d"]) == 0
    wanted = "quota 100.0 GB, dropped when unused for 7 d 0 h; 0 bytes in the pool\n"
    assert capsys.readouterr().out == f"s3://b/data: {wanted}"
    assert run([*limit, "--priority", "-5", "--quota", "none"]) == 0
    [found] = pool.namespaces.values()
    assert (found.priority, found.quota_bytes, found.ttl_s) == (-5, None, 7 * 86_400)
    assert run([*limit, "--priority", "0", "--ttl", "none"]) == 0
    assert capsys.readouterr().out.endswith("s3://b/data: no limits; 0 bytes in the pool\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to set: give --quota, --ttl or --priority"),
        (["--quota", "much"], "'much' is not a size"),
        (["--quota", "0"], "holds nothing"),
        (["--ttl", "7"], "'7' is not a time: write it like 90s, 30m, 12h, 7d or 2w"),
        (["--ttl", "0d"], "more than zero"),
        (["--ttl", "1e9d"], "is not a time"),
        (["--priority", "1001"], "1001 is not in the range -1000<=x<=1000"),
    ],
)
def test_limits_that_make_no_sense_are_code_2(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["limit", "s3://b/data", *words]) == 2
    assert message in capsys.readouterr().err
    assert not pool.namespaces


@pytest.mark.parametrize("words", [["pin"], ["unpin"], ["evict"], ["limit", "--priority", "1"]])
def test_a_name_of_nothing_is_code_2(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    for uri, message in (("", "the URI is empty"), ("gs://b/x", "no under-store for gs://b/x/")):
        assert run([*words, uri]) == 2
        assert message in capsys.readouterr().err
    assert not pool.namespaces


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("30min", 1800), ("1.5h", 5400), (" 7 D ", 604_800), ("2w", 1_209_600)],
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


# ---- checkpoints ----


def blob(name: str, payload: bytes, *, file: str, start: int) -> tuple[bytes, Item]:
    """The bytes of an item with a frame around its payload, and its row in the manifest."""
    head, tail = b"head of " + name.encode(), b"tail"
    return head + payload + tail, Item(
        name=name,
        offset=None,
        index=None,
        kind="opaque",
        dtype=None,
        shape=None,
        file=file,
        start=start,
        length=len(head) + len(payload) + len(tail),
        payload_start=len(head),
        payload_length=len(payload),
        frame_digest=frame_digest(head, tail),
        digests=payload_digests(memoryview(payload)),
    )


def save(
    pool: MemoryPool, *, state: Any = "durable", part: str = "", sizes: tuple[int, ...] = (10, 0, 70_000)
) -> None:
    """A save at RUN of one file with an item of each size."""
    name = f"{part or '__0'}_0.distcp"
    content, items = b"", []
    for number, size in enumerate(sizes):
        data, item = blob(f"item{number}", bytes([number + 1]) * size, file=name, start=len(content))
        content += data
        items.append(item)
    manifest = Manifest(
        save_id="id1",
        checkpoint=RUN,
        created_unix_s=1.0,
        torch="2.13",
        torchcache="0.1.0",
        dcp_version=None,
        files={name: len(content)},
        items=tuple(items),
    ).encode()
    key = f"run/step-1/{name}"
    if state == "durable":
        pool.put(f"{RUN}/{name}", content)
        pool.put(f"{RUN}/{part}.torchcache.json", manifest)
        pool.put(f"{RUN}/{part}.metadata", b"pickle")
    else:
        pool.save_files[ObjectId("s3", f"b/{key}", "save:id1")] = content
    pool.saved["s3", "b/run/step-1", part] = SaveInfo(
        store="s3",
        path="b/run/step-1",
        part=part,
        save_id="id1",
        state=state,
        manifest=manifest,
        pending_bytes=0 if state == "durable" else len(content),
        total_bytes=len(content),
        error=AlreadyExists("another save took over") if state == "failed" else None,
        committed_unix_s=1.0,
        durable_unix_s=0.0,
    )


def test_checkpoint_ls_merges_pool_and_storage(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    save(pool, state="committed")
    pool.put("s3://b/run/step-0/.metadata", b"pickle")
    pool.put("s3://b/run/step-0/.torchcache.json", b"{}")
    pool.put("s3://b/run/step-0/__0_0.distcp", b"12345")
    pool.put("s3://b/run/torch/.metadata", b"pickle")
    pool.put("s3://b/run/withdrawn/.metadata", b"")
    pool.put("s3://b/run/withdrawn/.torchcache.json", b"")
    found = run_json(capsys, "checkpoint", "ls", "s3://b/run")["checkpoints"]
    assert [(c["uri"], c["state"]) for c in found] == [
        ("s3://b/run/step-0", "durable"),
        ("s3://b/run/step-1", "cached"),
        ("s3://b/run/torch", "stock"),
    ]
    assert found[0]["bytes"] == 5
    assert found[1]["pending_bytes"] == found[1]["bytes"] > 70_000
    assert [c["uri"] for c in run_json(capsys, "checkpoint", "ls", RUN)["checkpoints"]] == [RUN]


def test_checkpoint_ls_shows_why_an_upload_failed(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, state="failed")
    assert run(["checkpoint", "ls", "s3://b/run"]) == 0
    assert "another save took over" in capsys.readouterr().out


def test_checkpoint_ls_of_none_is_no_failure(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "ls", "s3://b/data"]) == 0
    assert capsys.readouterr().out == "no checkpoints under s3://b/data\n"


@pytest.mark.parametrize("state", ["durable", "committed", "failed"])
@pytest.mark.parametrize("sizes", [(10, 0, 70_000), (PIECE_BYTES, PIECE_BYTES + GRANULE_BYTES + 1, 3)])
def test_verify_reads_every_byte(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], state: str, sizes: tuple[int, ...]
) -> None:
    save(pool, state=state, sizes=sizes)
    report = run_json(capsys, "checkpoint", "verify", RUN)
    assert report["ok"]
    assert report["items"] == 3
    assert report["bytes"] == sum(e.length for batch in pool.reads for e in batch) > sum(sizes)


@pytest.mark.parametrize("sizes", [(10, 0, 70_000), (PIECE_BYTES + 1, 3)])
def test_verify_finds_any_wrong_byte(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str], sizes: tuple[int, ...]
) -> None:
    save(pool, sizes=sizes)
    key = "s3", "b/run/step-1/__0_0.distcp"
    good = pool.objects[key]
    for at in (0, 16, 30, len(good) // 2, len(good) - 1):
        pool.objects[key] = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        report = run_json(capsys, "checkpoint", "verify", RUN, code=1)
        assert not report["ok"]
        assert len(report["faults"]) == 1
    assert run(["checkpoint", "verify", RUN]) == 1
    assert "bad: storage: __0_0.distcp: " in capsys.readouterr().out


def saved_in_both(pool: MemoryPool) -> tuple[ObjectId, bytes]:
    """One that is durable, of which two servers have a copy too; the copy's file and content."""
    save(pool)
    pool.addresses = {"server": "127.0.0.1:7440", "other": "127.0.0.1:7441"}
    name = "run/step-1/__0_0.distcp"
    copy, content = ObjectId("s3", f"b/{name}", "save:id1"), pool.objects["s3", f"b/{name}"]
    pool.save_files[copy] = content
    return copy, content


def test_verify_names_each_place(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    copy, content = saved_in_both(pool)
    report = run_json(capsys, "checkpoint", "verify", RUN)
    assert [(p["place"], p["ok"], p["missing_bytes"]) for p in report["places"]] == [
        ("127.0.0.1:7440", True, 0),
        ("127.0.0.1:7441", True, 0),
        ("storage", True, 0),
    ]
    assert report["read_bytes"] == 3 * report["bytes"]
    pool.save_files[copy] = content[:-1] + bytes([content[-1] ^ 1])
    report = run_json(capsys, "checkpoint", "verify", RUN, code=1)
    assert [(f["place"], f["file"], f["item"]) for f in report["faults"]] == [
        ("127.0.0.1:7440", "__0_0.distcp", "item2"),
        ("127.0.0.1:7441", "__0_0.distcp", "item2"),
    ]
    assert [p["ok"] for p in report["places"]] == [False, False, True]
    assert run(["checkpoint", "verify", RUN]) == 1
    assert "127.0.0.1:7441: bad, " in capsys.readouterr().out


def test_verify_of_a_server_that_is_gone_reads_the_others(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_in_both(pool)
    pool.held_errors["other"] = ServerUnavailable("it can't be reached")
    report = run_json(capsys, "checkpoint", "verify", RUN, code=1)
    assert [(p["place"], p["ok"]) for p in report["places"]] == [
        ("127.0.0.1:7440", True),
        ("127.0.0.1:7441", False),
        ("storage", True),
    ]
    assert [(f["place"], f["file"]) for f in report["faults"]] == [("127.0.0.1:7441", "")]


def test_verify_reads_storage_and_not_what_is_cached_of_it(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool)
    pool.hold(RUN, 70_000)
    run_json(capsys, "checkpoint", "verify", RUN)
    assert pool.namespaces[RUN].bytes == 0
    pool.hold(RUN, 70_000)
    pool.set_policy(RUN, pinned=True)
    assert run_json(capsys, "checkpoint", "verify", RUN)["ok"]
    assert pool.namespaces[RUN].bytes == 70_000


def test_verify_of_one_that_only_the_pool_has_counts_its_holders(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, state="committed")
    key = ("s3", "b/run/step-1", "")
    pool.saved[key] = dataclasses.replace(pool.saved[key], replicas=2)
    report = run_json(capsys, "checkpoint", "verify", RUN, code=1)
    assert [(p["place"], p["ok"]) for p in report["places"]] == [("127.0.0.1:7440", True), ("pool", False)]
    [fault] = report["faults"]
    assert "1 server holds all of it; when it was committed 2 did" in fault["error"]


def test_verify_finds_missing_and_short_files(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    save(pool)
    pool.put(f"{RUN}/__0_0.distcp", b"short")
    [fault] = run_json(capsys, "checkpoint", "verify", RUN, code=1)["faults"]
    assert "it has 5 bytes, and the manifest says" in fault["error"]
    pool.delete(f"{RUN}/__0_0.distcp")
    [fault] = run_json(capsys, "checkpoint", "verify", RUN, code=1)["faults"]
    assert "there is no" in fault["error"]


def test_verify_refuses_a_damaged_manifest(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    save(pool)
    key = ("s3", "b/run/step-1", "")
    broken = pool.saved[key].manifest.replace(b"item0", b"item9")
    pool.saved[key] = dataclasses.replace(pool.saved[key], manifest=broken)
    assert run(["checkpoint", "verify", RUN]) == 1
    assert "its checksum is wrong" in capsys.readouterr().err


def test_verify_of_parts_that_ranks_committed_for_themselves(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, part="__0")
    save(pool, part="__1")
    report = run_json(capsys, "checkpoint", "verify", RUN)
    assert [part["part"] for part in report["parts"]] == ["__0", "__1"]
    assert report["items"] == 6


def test_verify_of_one_that_is_still_being_saved_says_so(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, state="reserved")
    assert run(["checkpoint", "verify", RUN]) == 1
    assert "no committed checkpoint" in capsys.readouterr().err
    [found] = run_json(capsys, "checkpoint", "ls", RUN)["checkpoints"]
    assert found["state"] == "saving"


def test_verify_of_none_or_a_stock_checkpoint_says_so(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["checkpoint", "verify", RUN]) == 1
    assert capsys.readouterr().err == f"torchcache: there is no committed checkpoint at {RUN}\n"
    pool.put(f"{RUN}/.metadata", b"pickle")
    assert run(["checkpoint", "verify", RUN]) == 1
    assert "saved by torch without torchcache" in capsys.readouterr().err


def test_verify_stops_when_the_pool_is_gone(pool: MemoryPool, capsys: pytest.CaptureFixture[str]) -> None:
    save(pool)
    pool.errors[f"{RUN}/__0_0.distcp"] = ServerUnavailable("gone")
    assert run(["checkpoint", "verify", RUN]) == 3


# ---- texts ----


def test_texts() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 25_000_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "25.0 GB",
    ]
    assert [percent_text(f) for f in (0, 0.0001, 0.5, 0.9999, 1)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]
    assert [duration_text(s) for s in (0.25, 12, 61, 3700, 90_000)] == [
        "0.2 s",
        "12 s",
        "1 min 1 s",
        "1 h 1 min",
        "1 d 1 h",
    ]
