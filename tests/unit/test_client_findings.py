"""What the doctor of a client makes of what it sees."""

from __future__ import annotations

import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.unit.memory_pool import MemoryPool
from torchcache.cli import client_doctor
from torchcache.cli import client_findings as findings

NOW = datetime(2030, 1, 2, tzinfo=UTC)
FILE = stat.S_IFREG


@pytest.mark.parametrize(
    ("ahead_s", "unsure_s", "state", "said"),
    [
        (0.0, 0.1, "ok", "within 0.10 s"),
        (-5.0, 0.0, "ok", "within 5.00 s"),
        (9.0, 5.0, "ok", "within 9.00 s"),  # it may as well have been the call that took its time
        (60.0, 0.1, "warning", "60 s ahead of ours"),
        (-7200.0, 1.0, "warning", "7199 s behind ours"),
    ],
)
def test_clocks(ahead_s: float, unsure_s: float, state: str, said: str) -> None:
    found = findings.clock("a:1", ahead_s, unsure_s)
    assert (found.state, bool(found.advice)) == (state, state != "ok")
    assert said in found.what


def test_versions() -> None:
    same, other = findings.versions("0.2.0", {"a:1": "0.2.0", "b:1": "0.1.0"})
    assert (same.state, other.state) == ("ok", "warning")
    assert (other.about, other.what) == ("b:1", "0.1.0, and here 0.2.0")


@pytest.mark.parametrize(
    ("changed", "bad"),
    [
        ({}, set()),
        ({"descriptors": (-1, -1)}, set()),
        ({"descriptors": (256, 4096)}, {"open files"}),
        ({"servers": 1000}, {"open files"}),
        ({"mappings": 1000}, {"mappings"}),
        ({"mappings": None}, set()),
        ({"shared": (64 << 20, 64 << 20)}, {"/dev/shm"}),
        ({"shared": (8 << 30, 1 << 20)}, {"/dev/shm"}),
        ({"shared": None}, {"/dev/shm"}),
    ],
)
def test_limits(changed: dict[str, object], bad: set[str]) -> None:
    well = {"descriptors": (4096, 4096), "servers": 4, "mappings": 65_530, "shared": (8 << 30, 8 << 30)}
    found = list(findings.limits(**well | changed))  # type: ignore[arg-type]
    assert {one.about for one in found if one.state != "ok"} == bad
    assert all(bool(one.advice) == (one.state != "ok") for one in found)


@pytest.mark.parametrize(
    ("mode", "owner", "text", "state"),
    [
        (FILE | 0o600, 7, "a-token-of-the-servers", "ok"),
        (FILE | 0o640, 7, "a-token-of-the-servers", "problem"),
        (FILE | 0o440, 0, "a-token-of-the-servers", "warning"),
        (FILE | 0o600, 0, "a-token-of-the-servers", "warning"),
        (FILE | 0o600, 7, "short", "problem"),
        (FILE | 0o600, 0, None, "problem"),
    ],
)
def test_files_of_tokens(mode: int, owner: int, text: str | None, state: str) -> None:
    found = findings.token_file("/t", mode=mode, owner=owner, me=7, text=text)
    assert found.state == state
    assert not text or text not in f"{found}"


@pytest.mark.parametrize(("days", "state"), [(-1, "problem"), (0, "problem"), (29, "warning"), (31, "ok")])
def test_certificates(days: int, state: str) -> None:
    assert findings.certificate("/c", NOW + timedelta(days=days), NOW).state == state


def test_disks() -> None:
    status: Any = MemoryPool().status()
    well = replace(status[0], out_of_service="", disk_errors=0)
    assert findings.server_disk(well).state == "ok"
    assert findings.server_disk(replace(well, disk_errors=1)).state == "warning"
    assert findings.server_disk(replace(well, out_of_service="it burns")).state == "problem"
    assert findings.home_disk("/h", 1 << 40, writable=True, holds_a_pool=True).state == "ok"
    assert findings.home_disk("/h", 1 << 20, writable=True, holds_a_pool=True).state == "warning"
    assert findings.home_disk("/h", 1 << 20, writable=True, holds_a_pool=False).state == "ok"
    assert findings.home_disk("/h", 1 << 40, writable=False, holds_a_pool=False).state == "warning"
    assert findings.home_disk("/h", 1 << 40, writable=False, holds_a_pool=True).state == "problem"


@pytest.mark.parametrize("lane", ["local", "flight"])
def test_a_server_that_does_not_say_how_it_is(lane: str) -> None:
    """Whatever its lane: the local one reads files without it, and the data port isn't what stands in the way."""
    pool = MemoryPool()
    pool.lanes["127.0.0.1:7441"] = lane
    found = {one.about: one for one in client_doctor._in_use(pool) if one.check == "lanes"}
    assert found["127.0.0.1:7440"].state == "ok"
    assert found["127.0.0.1:7441"].state == "problem"
    assert "doesn't say how it is" in found["127.0.0.1:7441"].what
