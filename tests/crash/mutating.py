"""Runs tests against changed copies of the source tree, and names the test that noticed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Final

from tests.crash.exploring import DRAWN_WAYS, SCRATCH
from tests.crash.mutation import Mutant

ROOT: Final = Path(__file__).parents[2]
_COPIED: Final = ("server", "torchcache", "tests", "examples")
_ENOUGH_S: Final = 900
_NONE: Final = "none in particular"
_DEADLY: Final = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)

_STATES: Final = (
    "tests/crash/test_seam_calls.py",
    "tests/crash/test_checks.py",
    "tests/crash/test_crash_states.py",
)
_MENDING: Final = "tests/crash/test_mending_crashes.py"
_LIKELY: Final = {
    "cache/borrowing.py": ("tests/unit/test_borrowing.py",),
    "cache/slots.py": ("tests/unit/test_borrowing.py",),
    "cache/": (
        "tests/unit/test_write_back.py",
        "tests/unit/test_write_back_upload.py",
        "tests/unit/test_write_back_crashes.py",
        "tests/unit/test_service_data.py",
    ),
    "service/": ("tests/unit/test_service_data.py",),
    "store/chunk.py": ("tests/crash/test_checks.py",),
    "store/handing_out.py": ("tests/unit/test_local_writing.py",),
    "store/folder.py": ("tests/unit/test_store_folder.py",),
    "store/identity.py": ("tests/unit/test_store_folder.py",),
    "store/ledger.py": ("tests/unit/test_store_ledger.py",),
    "store/mending.py": (_MENDING, "tests/unit/test_examination.py"),
    "store/reading.py": ("tests/crash/test_checks.py",),
    "understore/": ("tests/unit/test_understore_posix_durable.py", "tests/unit/test_understore_posix.py"),
    "records.py": ("tests/crash/test_checks.py", "tests/unit/test_store_record.py"),
    "store/segment_scan.py": ("tests/crash/test_checks.py",),
    "store/segments.py": (
        "tests/unit/test_store_recovery.py",
        "tests/unit/test_store_faults.py",
    ),
}
"""Which tests are asked first, by the start of a source file's path: a run costs what comes before the killer."""


def tests_for(mutant: Mutant, copy: Path) -> list[list[str]]:
    """All tests of the store and of saves, in the order in which they are asked: those first that are likely to notice.

    Each list is a run of its own, since pytest has an order of its own within a run.
    """
    file = mutant.name.partition(":")[0]
    likely = [name for start, names in _LIKELY.items() if file.startswith(start) for name in names]
    others = sorted(
        path.relative_to(copy).as_posix()
        for pattern in ("store", "write_back", "borrowing", "service_data", "examination", "local_writing")
        for path in (copy / "tests" / "unit").glob(f"test_{pattern}*.py")
    )
    by_states = mutant.loses_bytes and file.startswith("store/") and _MENDING not in likely
    runs = [[*_STATES], likely] if by_states else [likely, [*_STATES]]
    asked = {test for run in runs for test in run}
    rest = [test for test in (*others, "tests/conformance/test_stores.py") if test not in asked]
    return [run for run in (*runs, rest) if run]


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """Copies of the source tree to change."""
    with TemporaryDirectory(dir=SCRATCH, prefix="mutants-") as scratch:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            copy = Path(scratch, str(number))
            for name in _COPIED:
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", copy)
            free.put(copy)
        yield free


def killer_of(mutant: Mutant, free: SimpleQueue[Path], tests: Sequence[str] = ()) -> str | None:
    """The first of `tests`, or of all, that fails for the mutant and not without it; None if none does."""
    copy = free.get()
    original = (copy / mutant.path).read_text()
    runs = [list(tests)] if tests else tests_for(mutant, copy)
    try:
        for chosen in runs:
            (copy / mutant.path).write_text(mutant.source)
            while (failed := first_failure(copy, chosen)) is not None:
                if failed.startswith(_NONE):
                    return failed
                test = failed.partition(",")[0]
                again = first_failure(copy, [test])
                (copy / mutant.path).write_text(original)
                if again is not None and first_failure(copy, [test]) is None:
                    return failed
                chosen += [
                    "--deselect",
                    test,
                ]  # it fails now and then, on a busy machine say, and proves nothing
                (copy / mutant.path).write_text(mutant.source)
        return None
    finally:
        (copy / mutant.path).write_text(original)
        free.put(copy)


def first_failure(copy: Path, tests: Sequence[str]) -> str | None:
    """Runs tests in a copy of the tree. Raises RuntimeError if they can't even be run."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHCACHE_")}
    environ |= {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'server'}", "PYTHONDONTWRITEBYTECODE": "1"}
    environ["CRASH_WAYS"] = str(DRAWN_WAYS)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-m", "not long", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environ, capture_output=True, text=True, timeout=_ENOUGH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{_NONE}: they hang"
    if done.returncode == 0:
        return None
    if -done.returncode in _DEADLY:  # of a page that isn't there
        died = re.search(
            rf'File "{re.escape(str(copy))}/(tests/\S+)", line \d+ in (test_\w+)', done.stderr + done.stdout
        )
        return (
            f"{died[1]}::{died[2]}, by signal {-done.returncode}"
            if died
            else f"{_NONE}: signal {-done.returncode}"
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"the tests can't be run:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return failed[1]


def killers(found: Sequence[Mutant], processes: int) -> Iterator[tuple[Mutant, str | None]]:
    """Each mutant and its killer, in order."""
    with copies(processes) as free, ThreadPoolExecutor(processes) as threads:
        yield from zip(found, threads.map(lambda mutant: killer_of(mutant, free), found), strict=True)
