"""The generator of docs/reliability.md, and that what it says leads somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.reliability_report import (
    DOCUMENT,
    FAULTS,
    GOALS,
    HOSTILE,
    INVARIANTS,
    ROOT,
    by_part,
    fuzz_table,
    hostile_table,
    marked_tests,
    marks_table,
    proofs_in,
    proofs_table,
    read_proofs,
    replace_part,
)

PROOFS = {
    "crash-states.jsonl": [
        {"proof": "crash-states", "states": 1_000_000, "seed": 7, "wall_s": 3599.6, "commit": "1a2b3c4"},
        {
            "proof": "crash-states",
            "states": 234,
            "seed": 8,
            "shape": "torn",
            "wall_s": 0.4,
            "commit": "5d6e7f8-dirty",
        },
    ],
    "bad.jsonl": [{"proof": "bad-luck", "hit_rate": 0.5, "first_seed": 7, "last_seed": 9, "wall_s": 61.25}],
}

TABLE = """\
| what | how many | seed | wall time | commit | test |
|---|---|---|---|---|---|
| bad luck | 0.50 hit rate | first 7, last 9 | 61.2 s |  | [unit/test_luck.py](../tests/unit/test_luck.py) |
| crash states | 1,000,234 states, shape: torn | 7, 8 | 60 min | 1a2b3c4, 5d6e7f8-dirty |  |

On a day."""

TESTS = '''
"""Disks that fail (F12)."""

class TestOne:
    """Not a mark: F123, AF1."""

    def test_a(self):
        """F1, F2: twice F1; I6; F20 to F22."""

def test_b():
    """F2."""
    with proof("bad-luck") as figures:
        pass

def test_c_f3():
    pass

def helper():
    """F2."""
'''

MARKS = """\
| | fault | shown by |
|---|---|---|
| F1 | killed | [test_a](../tests/unit/test_luck.py) |
| F2 | torn | [test_a](../tests/unit/test_luck.py), [test_b](../tests/unit/test_luck.py) |
| F3 | lost | [test_c_f3](../tests/unit/test_luck.py) |
| F4 | never |  |
| F12 | EIO | [test_luck.py](../tests/unit/test_luck.py) |"""


@pytest.fixture
def tests_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "unit"
    folder.mkdir(parents=True)
    (folder / "test_luck.py").write_text(TESTS)
    return tmp_path / "tests"


def test_the_table_of_proofs(tmp_path: Path, tests_folder: Path) -> None:
    for name, lines in PROOFS.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert proofs_table(read_proofs(tmp_path), proofs_in(tests_folder), "On a day.") == TABLE


@pytest.mark.parametrize(
    ("longest", "slow", "said"),
    [
        ([598.5, 1000.0], 101.6, ("yes", "yes")),
        ([1250.0, 3.0], 104.9, ("no, 1.25 times that", "no, 1.03 times that")),
    ],
)
def test_a_goal_is_told_with_whether_it_is_reached(
    tmp_path: Path, longest: list[float], slow: float, said: tuple[str, str]
) -> None:
    lines: list[dict[str, object]] = [{"proof": "host-killed", "ms the longest": ms} for ms in longest]
    p99 = {"ms their p99 with all well": 50.8, "ms their p99 with one slow": slow}
    lines += [{"proof": "host-slow", **p99}, {"proof": "luck", "reads": 3}]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    title, _, killed, slowed, luck = proofs_table(read_proofs(tmp_path), {}, "").splitlines()[:5]
    assert title == "| what | how many | goal | reached | seed | wall time | commit | test |"
    assert killed.split(" | ")[1:4] == [
        f"{max(longest):,.2f} ms the longest",
        "the longest read at most 1 s",
        said[0],
    ]
    assert slowed.split(" | ")[2:4] == ["the p99 with one slow at most twice that with all well", said[1]]
    assert luck.split(" | ")[2:4] == ["", ""]


def test_every_goal_is_of_figures_that_a_test_publishes() -> None:
    files = proofs_in(ROOT / "tests")
    for name, goal in GOALS.items():
        published = (ROOT / files[name]).read_text()
        for key in filter(None, (goal.key, goal.beside)):
            assert f'"{key}"' in published


def test_the_table_of_what_was_fuzzed(tmp_path: Path) -> None:
    line = {"proof": "fuzz-a-parser", "executions": 500_000, "seed": 1, "by": "Atheris", "wall_s": 61.2}
    (tmp_path / "fuzz-a-parser.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'seed': 2})}\n")
    table = fuzz_table(read_proofs(tmp_path), "On a day.")
    assert table.splitlines()[2:] == [
        "| a parser | 1,000,000 | Atheris | 2 min |",
        "",
        "None failed. On a day.",
    ]


def test_proofs_of_hosts_have_a_table_of_their_own(tmp_path: Path) -> None:
    for name, lines in PROOFS.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = by_part(read_proofs(tmp_path), {"bad-luck": "tests/e2e/test_soak.py"})
    assert {part: [proof.name for proof in some] for part, some in parts.items()} == {
        "hosts": ["bad-luck"],
        "proofs": ["crash-states"],
    }


def test_the_lists_of_tests(tests_folder: Path) -> None:
    meanings = {"F1": "killed", "F2": "torn", "F3": "lost", "F4": "never", "F12": "EIO"}
    found = marked_tests(tests_folder)
    assert marks_table("fault", meanings, found) == MARKS
    assert sorted(found) == ["F1", "F12", "F2", "F20", "F21", "F22", "F3", "I6"]


def test_many_tests_of_one_fault_are_counted() -> None:
    found = {"F1": [("tests/test_x.py", f"test_{n}") for n in range(9)]}
    [row] = marks_table("fault", {"F1": "killed"}, found).splitlines()[2:]
    assert row.count("](") == 6
    assert row.endswith("[test_5](../tests/test_x.py), and 3 more |")


def test_only_the_part_between_the_markers_changes() -> None:
    document = (
        "a\n<!-- x: generated -->\nold\n<!-- end of x -->\nb\n<!-- y: generated -->\n<!-- end of y -->\n"
    )
    once = replace_part(document, "x", "new")
    assert once == document.replace("old", "new")
    assert replace_part(once, "x", "new") == once
    for broken in ("", "<!-- x: generated -->", "<!-- end of x -->"):
        with pytest.raises(ValueError, match="no part 'x'"):
            replace_part(broken, "x", "new")


# ---- the document itself ----


@pytest.mark.parametrize("part", ["proofs", "hosts", "invariants", "faults"])
def test_the_documents_tables_are_tables(part: str) -> None:
    document = DOCUMENT.read_text()
    [content] = re.findall(rf"<!-- {part}: generated -->\n(.*?)<!-- end of {part} -->", document, re.DOTALL)
    lines = [line for line in content.splitlines() if line.startswith("|")]
    assert len(lines) >= (2 if part in ("proofs", "hosts") else 8), "proofs come with the first run"
    assert set(lines[1]) == {"|", "-"}
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_every_fault_and_invariant_has_a_test_and_the_document_knows_it() -> None:
    found = marked_tests(ROOT / "tests")
    document = DOCUMENT.read_text()
    for mark in (*INVARIANTS, *FAULTS):
        assert found[mark], f"no test says that it shows {mark}"
        [row] = re.findall(rf"^\| {mark} \|.*$", document, re.MULTILINE)
        assert "](../tests/" in row, f"{mark} is shown by nothing: run python -m tests.reliability_report"


def test_every_test_the_document_names_is_there() -> None:
    """If this fails: python -m tests.reliability_report."""
    named = re.findall(r"\[(test_\w+(?:\.py)?)\]\(\.\./(tests/[^)]+)\)", DOCUMENT.read_text())
    assert named
    for test, file in named:
        there = test == Path(file).name or f"def {test}(" in (ROOT / file).read_text()
        assert there, f"{test} isn't in {file}"


def test_the_hostile_suite_is_counted_by_group() -> None:
    counts = {group: {"tests/a.py": least - 1, "tests/b/c.py": 1} for group, (_, least) in HOSTILE.items()}
    table = hostile_table(counts).splitlines()
    assert table[2].startswith("| keys | 120 |") and "[b/c.py](../tests/b/c.py)" in table[2]
    assert table[-1] == f"| all | {sum(least for _, least in HOSTILE.values())} | | |"
    counts["bombs"] = {"tests/a.py": 29}
    with pytest.raises(ValueError, match="'bombs': 30 are due"):
        hostile_table(counts)


def test_every_group_of_the_document_has_its_cases() -> None:
    """Of those whose files are marked: the counts themselves are of a collection."""
    marked = {
        group
        for file in (ROOT / "tests").rglob("*.py")
        for group in re.findall(r'mark\.hostile\("(\w+)"\)', file.read_text())
    }
    assert marked == set(HOSTILE)
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \|", DOCUMENT.read_text(), re.M)
    said = {group: int(cases.replace(",", "")) for group, cases in rows if group in HOSTILE}
    assert all(said[group] >= least for group, (_, least) in HOSTILE.items())
