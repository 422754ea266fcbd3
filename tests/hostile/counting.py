"""A pytest plugin that counts the hostile suite's cases by group and file, without running them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
_LINE: Final = "hostile cases: "
_CONTRACTS: Final = ("tests/conformance/test_lanes.py", "tests/conformance/test_lanes_local.py")
"""Where the marked tests of tests/conformance/lane*.py are played."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prints the counts: a group, a file, how many."""
    found: Counter[tuple[str, str]] = Counter()
    for item in session.items:
        mark = item.get_closest_marker("hostile")
        if mark is not None:
            found[mark.args[0], item.path.relative_to(ROOT).as_posix()] += 1
    print(_LINE + json.dumps([[*key, count] for key, count in sorted(found.items())]))


def count() -> dict[str, dict[str, int]]:
    """Cases by group, then by file, as pytest collects them."""
    marked = [
        file.relative_to(ROOT).as_posix()
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.hostile(" in file.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.hostile.counting"]
    done = subprocess.run(
        [*command, "-m", "hostile", *marked, *_CONTRACTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(_LINE)]
    groups: dict[str, dict[str, int]] = {}
    for group, file, cases in json.loads(line.removeprefix(_LINE)):
        groups.setdefault(group, {})[file] = cases
    return groups
