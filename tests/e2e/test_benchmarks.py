"""The benchmarks keep running: one tiny round of some, in the long run of each. The document says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.__main__ import SECTIONS, section
from benchmarks.findings import Goal, Row
from benchmarks.report import DOCUMENT, RESULTS, blocks, document, plots
from benchmarks.tables import cells, markdown

ROOT = Path(__file__).parents[2]


SOME = ("local", "placement", "verification", "recycling", "eviction")
"""One of each sort: over the embedded pool, the store alone, neither; with contenders and without; all goals."""


@pytest.fixture(
    scope="module", params=[SOME, pytest.param(tuple(SECTIONS), marks=pytest.mark.long)], ids=["some", "all"]
)
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.fixture(scope="module")
def measured(names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--tiny", f"--json={out}"]
    command += [] if names == tuple(SECTIONS) else [f"--only={','.join(names)}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=800, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def test_every_section_can_be_loaded() -> None:
    for name in SECTIONS:
        assert callable(section(name)), name


@pytest.mark.timeout(900)  # some 20 processes, one after the other: long where the machine is busy
def test_a_tiny_round_measures_every_section(measured: dict, names: tuple[str, ...]) -> None:
    assert list(measured) == list(names)
    for name, found in measured.items():
        assert found["rows"], name
        for row in found["rows"]:
            assert row["ours"] >= 0, row
            assert row["bare"] is None or row["bare"] >= 0, row
            assert (row["reached"] is None) == (row["goal"] is None), row


def test_contenders_move_the_same_bytes(measured: dict) -> None:
    groups = [group for found in measured.values() for group in found["contenders"].values()]
    assert groups
    for group in groups:
        assert len({one["bytes"] for one in group}) == 1, group
        assert min(one["bytes"] for one in group) > 0


def test_a_document_holds_what_was_measured(measured: dict, names: tuple[str, ...]) -> None:
    text = (
        "Before\n"
        + "".join(f"<!-- figures: {name} -->\nstale figures\n<!-- end -->\n" for name in SECTIONS)
        + "after"
    )
    made = document(text, measured)
    assert made.startswith("Before\n")
    assert made.endswith("after")
    assert "stale figures" not in made
    for name, found in measured.items():
        assert markdown(found) in made, name
    assert blocks(made) == list(SECTIONS)
    for name in SECTIONS.keys() - names:
        assert f"<!-- figures: {name} -->\n<!-- end -->" in made, "what wasn't measured is left empty"
    assert document(made, measured) == made
    drawn = plots(measured)
    assert drawn
    for picture in drawn.values():
        ElementTree.fromstring(picture)


def test_the_document_is_consistent_with_the_committed_results() -> None:
    results, text = json.loads(RESULTS.read_text()), DOCUMENT.read_text()
    assert blocks(text) == list(SECTIONS), "each section has its place in the document"
    assert document(text, results) == text, "run: python -m benchmarks --report"
    assert {path.name: path.read_text() for path in RESULTS.parent.glob("*.svg")} == plots(results)
    assert set(results) <= set(SECTIONS)


@pytest.mark.parametrize(
    ("better", "ours", "bare", "ratio"),
    [("less", 2.0, 3.0, 1.5), ("more", 3.0, 2.0, 1.5), ("less", 2.0, None, None)],
)
def test_a_ratio_says_how_much_better_ours_is(
    better: str, ours: float, bare: float | None, ratio: float
) -> None:
    assert Row(what="", unit="", ours=ours, bare=bare, better=better).ratio == ratio


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal(bound=1.5), True),
        (Goal(bound=1.6), False),
        (Goal(bound=2.0, of="value", sense="at most"), True),
        (Goal(bound=1.9, of="value", sense="at most"), False),
        (None, None),
    ],
)
def test_a_goal_is_reached_or_not(goal: Goal | None, reached: bool | None) -> None:
    row = Row(what="a", unit="s", ours=2.0, bare=3.0, against="b", goal=goal)
    assert row.reached is reached
    plain = {
        "rows": [{**row.__dict__, "goal": goal and goal.__dict__, "ratio": row.ratio, "reached": row.reached}]
    }
    assert next(iter(cells(plain)))[-1] == {True: "yes", False: "no", None: ""}[reached]
