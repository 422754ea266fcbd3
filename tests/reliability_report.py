"""Writes the generated parts of docs/reliability.md: what the last run proved, and which test shows what.

`python -m tests.reliability_report [FOLDER]`: with the folder that `TORCHCACHE_PROOFS` named (see proofs.py) it
rewrites the tables of the proofs there, too, else only the lists of tests. `make reliability` does all of it.
"""

from __future__ import annotations

import ast
import datetime
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.rounds import machine
from tests.hostile import counting
from tests.proofs import commit

ROOT: Final = Path(__file__).parents[1]
DOCUMENT: Final = ROOT / "docs" / "reliability.md"

INVARIANTS: Final = {
    "I1": "no wrong byte",
    "I2": "acknowledged is restorable",
    "I3": "the old checkpoint or the new one",
    "I4": "every call ends",
    "I5": "back to baseline",
    "I6": "only copies stay",
}

FAULTS: Final = {
    "F1": "killed while filling",
    "F2": "killed while writing a checkpoint",
    "F3": "power cut: unsynced writes lost, reordered",
    "F4": "torn chunk",
    "F5": "bit flip in a payload",
    "F6": "bit flip in a header or in the index",
    "F7": "truncated file",
    "F8": "zeros where a chunk was",
    "F9": "a sound chunk under the wrong key",
    "F10": "disk full on a fill",
    "F11": "disk full on a checkpoint",
    "F12": "EIO on a read",
    "F13": "EIO on fsync",
    "F14": "out of descriptors",
    "F15": "read-only disk, or gone",
    "F16": "a server ten or a hundred times slower than the others",
    "F17": "a server that swallows what it is sent",
    "F18": "a connection that is reset amid a stream",
    "F19": "a server comes back with another's past",
    "F20": "two servers on one port, or on one store",
    "F21": "servers come and go while a checkpoint is saved",
    "F22": "clocks that are wrong",
    "F23": "storage that says 503, SlowDown",
    "F24": "storage that stalls",
    "F25": "storage whose answer is too short, under a 200",
    "F26": "an object that changes while it is read",
    "F27": "a conditional write that storage refuses, or whose answer is lost",
    "F28": "a client that is killed",
    "F29": "a fork with channels open",
    "F30": "a commit that comes twice",
    "F31": "two writers of one path",
    "F32": "a rank, or the coordinator, dies in a save",
    "F33": "a manifest, or a record of a save, that is damaged",
    "F34": "a shard of a checkpoint is damaged",
    "F35": "short of memory, or of room: more saves than uploads",
    "F36": "stopped while uploads wait",
    "F37": "a server with a copy is lost before the upload",
    "F38": "eviction against readers and against what isn't durable",
    "F39": "a capacity below one segment",
    "F40": "a store of another format",
}
"""The failure model, by number."""

HOSTILE: Final = {
    "keys": ("keys and paths of objects and saves, by every call that takes one", 120),
    "uris": ("URIs where a name belongs, buckets that are hosts, redirects", 60),
    "wire": ("frames, messages, tickets and batches on both ports that are none, or lie", 90),
    "auth": ("no token, almost a token, too little a scope, no certificate or another's", 60),
    "pages": ("pages of listings and of reads that lie, from storage and from servers", 60),
    "manifests": ("commits, manifests and headers that point elsewhere, overlap or claim too much", 60),
    "deserialisation": ("pickles with code, records of samples that nobody wrote", 40),
    "bombs": ("little that unpacks to much", 30),
    "folders": ("symlinks, FIFOs, folders and rights where the server expects its own", 40),
    "races": ("files and folders that become something else under a server that runs", 40),
    "exhaustion": ("connections, calls, streams and bytes beyond the bounds, and such as never end", 30),
    "secrets": ("every place where something is said, for tokens and storage's credentials", 20),
}
"""The groups of the hostile suite: what they bring, and of how many cases at least."""

FUZZ: Final = "fuzz-"
"""What the names of the fuzz targets' figures begin with: they have a table of their own, and may be run alone."""
PARTS: Final = {
    "hosts": ("tests/e2e/test_hosts.py", "tests/e2e/test_soak.py"),
    "datasets": (
        "tests/e2e/test_iterable_matrix.py",
        "tests/e2e/test_map_matrix.py",
        "tests/e2e/test_exactness_chains.py",
    ),
}
"""Proofs of these files have a table of their own, which may be of another run than "proofs", that of all others."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a proof's figure is to be, itself or divided by the one `beside` it: at most `bound`.

    It is told and not asserted: how long something takes hangs on what else the machine does.
    """

    text: str
    key: str
    bound: float
    beside: str | None = None

    def reached(self, counts: Mapping[str, float]) -> str:
        """Whether, for the table; by how much it isn't. Raises KeyError if the proof has no such figure."""
        found = counts[self.key] / (1 if self.beside is None else counts[self.beside])
        return "yes" if found <= self.bound else f"no, {found / self.bound:.2f} times that"


_PAUSE: Final = Goal(text="the longest read at most 1 s", key="ms the longest", bound=1000)
GOALS: Final = {
    "host-killed": _PAUSE,
    "host-stopped": _PAUSE,
    "host-unplugged": _PAUSE,
    "host-slow": Goal(
        text="the p99 with one slow at most twice that with all well",
        key="ms their p99 with one slow",
        beside="ms their p99 with all well",
        bound=2,
    ),
}
"""By proof. A table in which one has a goal has a column of them, and one that says whether it is reached."""

_COLUMNS: Final = ("seed", "commit")
"""Facts that aren't told among the counts."""
_NAMED: Final = 6  # tests by name in a row; more are counted


@dataclass
class Proof:
    """What all runs of one proof add up to."""

    name: str
    counts: dict[str, float] = field(default_factory=dict)
    facts: dict[str, list[str]] = field(default_factory=dict)  # what can't be added: seeds, words, commits
    wall_s: float = 0.0

    def add(self, line: Mapping[str, object]) -> None:
        """Takes in one line of the proof's file."""
        for key, value in line.items():
            if key == "wall_s" and isinstance(value, int | float):
                self.wall_s += value
            elif key.endswith("seed"):
                self._list("seed", f"{key[:-4].strip('_')} {value}".strip())
            elif key != "proof" and isinstance(value, str):
                self._list(key, value)
            elif isinstance(value, int | float):
                before = self.counts.get(key, 0)
                self.counts[key] = max(before, value) if key.endswith("the longest") else before + value

    def _list(self, key: str, value: str) -> None:
        values = self.facts.setdefault(key, [])
        if value not in values:
            values.append(value)


def read_proofs(folder: Path) -> list[Proof]:
    """All proofs in the folder, by name. Numbers of several lines are added up, seeds and words are listed; of what
    took longest the longest counts."""
    found: dict[str, Proof] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            name = str(line["proof"])
            found.setdefault(name, Proof(name)).add(line)
    return [found[name] for name in sorted(found)]


def by_part(proofs: Iterable[Proof], where: Mapping[str, str]) -> dict[str, list[Proof]]:
    """The proofs of each part of the document that has any. `where`: the test file of each proof."""
    found: dict[str, list[Proof]] = defaultdict(list)
    for proof in proofs:
        parts = [name for name, files in PARTS.items() if where.get(proof.name) in files]
        parts += ["fuzz" if proof.name.startswith(FUZZ) else "proofs"]
        found[parts[0]].append(proof)
    return found


def proofs_table(
    proofs: Sequence[Proof], where: Mapping[str, str], ran: str, goals: Mapping[str, Goal] = GOALS
) -> str:
    """Markdown. `where`: the test file of each proof. `ran`: when and on what."""
    titles = ["what", "how many", "seed", "wall time", "commit", "test"]
    has_goals = any(proof.name in goals for proof in proofs)
    if has_goals:
        titles[2:2] = ["goal", "reached"]
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for proof in proofs:
        counts = [f"{_number(value)} {key.replace('_', ' ')}" for key, value in proof.counts.items()]
        words = [
            f"{k.replace('_', ' ')}: {', '.join(v)}" for k, v in proof.facts.items() if k not in _COLUMNS
        ]
        test = _link(where[proof.name]) if proof.name in where else ""
        goal = goals.get(proof.name)
        cells = [
            proof.name.replace("-", " "),
            ", ".join(counts + words),
            ", ".join(proof.facts.get("seed", [])),
            _time(proof.wall_s),
            ", ".join(proof.facts.get("commit", [])),
            test,
        ]
        if has_goals:
            cells[2:2] = ["", ""] if goal is None else [goal.text, goal.reached(proof.counts)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", ran])


def proofs_in(tests: Path) -> dict[str, str]:
    """The file, from the repository's root, in which each proof is."""
    return {
        name: file.relative_to(tests.parent).as_posix()
        for file in sorted(tests.rglob("*.py"))
        for name in re.findall(r'\bproof\(\s*f?"([\w-]+)"', file.read_text())
    }


def fuzz_table(proofs: Iterable[Proof], ran: str) -> str:
    """Markdown: the fuzz targets with what was played against each. `ran`: when and on what."""
    rows = ["| parser | inputs | by | wall time |", "|---|---|---|---|"]
    for proof in proofs:
        name, by = proof.name.removeprefix(FUZZ).replace("-", " "), ", ".join(proof.facts.get("by", []))
        rows.append(f"| {name} | {_number(proof.counts['executions'])} | {by} | {_time(proof.wall_s)} |")
    return "\n".join([*rows, "", f"None failed. {ran}"])


def marked_tests(tests: Path) -> dict[str, list[tuple[str, str]]]:
    """For each fault and invariant the (file, test) whose docstring names it; or the file, where its docstring does.

    The name of a test may do so too, at its end: `test_a_corrupt_manifest_is_refused_f33`.
    """
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file in sorted(tests.rglob("test_*.py")):
        path = file.relative_to(tests.parent).as_posix()
        for name, said in _docstrings(ast.parse(file.read_text()), file.name):
            for mark in _marks(said, name):
                found[mark].append((path, name))
    return found


def _marks(said: str, name: str) -> list[str]:
    """F1, I6 and the like, each once; "F3 to F5" are three."""
    if told := re.search(r"_f(\d{1,2})$", name):
        said += f" F{told[1]}"
    for first, last in re.findall(r"\bF(\d{1,2}) to F(\d{1,2})\b", said):
        said += "".join(f" F{number}" for number in range(int(first), int(last)))
    return sorted(set(re.findall(r"\b[FI]\d{1,2}\b", said)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterable[tuple[str, str]]:
    yield name, ast.get_docstring(node) or ""
    if not isinstance(node, ast.FunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name.lower().startswith("test"):
                yield from _docstrings(child, child.name)


def marks_table(title: str, marks: Mapping[str, str], tests: Mapping[str, list[tuple[str, str]]]) -> str:
    """Markdown: what each mark means, and the tests that name it."""
    rows = [f"| | {title} | shown by |", "|---|---|---|"]
    for mark, meaning in marks.items():
        found = tests.get(mark, [])
        named = [f"[{test}](../{file})" for file, test in found[:_NAMED]]
        if len(found) > _NAMED:
            named.append(f"and {len(found) - _NAMED} more")
        rows.append(f"| {mark} | {meaning} | {', '.join(named)} |")
    return "\n".join(rows)


def hostile_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown: the cases of each group, and where they are. Raises ValueError if a group has too few."""
    rows = ["| group | cases | what comes | where |", "|---|---|---|---|"]
    for group, (meaning, least) in HOSTILE.items():
        files = counts.get(group, {})
        cases = sum(files.values())
        if cases < least:
            raise ValueError(f"{cases} hostile cases of {group!r}: {least} are due")
        rows.append(f"| {group} | {cases} | {meaning} | {', '.join(map(_link, files))} |")
    total = sum(sum(files.values()) for files in counts.values())
    return "\n".join([*rows, f"| all | {total:,} | | |"])


def replace_part(document: str, name: str, content: str) -> str:
    """Puts `content` between the markers of the part `name`. Raises ValueError if the document hasn't both."""
    start, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    before, found, rest = document.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no part {name!r}: it needs the lines {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def ran_on(day: datetime.date) -> str:
    """The line under the table: when and at which commit it was written, and on what all of it ran."""
    facts = machine()
    return (
        f"Written on {day.isoformat()} at commit {commit()}: Python {facts['python']}, {facts['system']}, "
        f"{facts['cores']} cores of {facts['cpu']}, lmdb {facts['lmdb']}, xxhash {facts['xxhash']}."
    )


def _link(path: str) -> str:
    return f"[{path.removeprefix('tests/')}](../{path})"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def main(folder: Path | None) -> None:
    document, tests = DOCUMENT.read_text(), ROOT / "tests"
    marks = marked_tests(tests)
    document = replace_part(document, "invariants", marks_table("invariant", INVARIANTS, marks))
    document = replace_part(document, "faults", marks_table("fault", FAULTS, marks))
    document = replace_part(document, "hostile", hostile_table(counting.count()))
    if folder is not None:
        found = read_proofs(folder)
        if not found:
            raise SystemExit(f"{folder} holds no proofs: run the tests with TORCHCACHE_PROOFS={folder}")
        ran = ran_on(datetime.datetime.now(datetime.UTC).date())
        where = proofs_in(tests)
        for part, some in by_part(found, where).items():
            table = fuzz_table(some, ran) if part == "fuzz" else proofs_table(some, where, ran)
            document = replace_part(document, part, table)
    DOCUMENT.write_text(document)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
