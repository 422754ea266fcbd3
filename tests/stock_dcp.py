"""PyTorch's own tests of DCP with our writer and reader in place of stock's: counts of both.

    python -m tests.stock_dcp FOLDER

FOLDER is a copy of PyTorch's test/distributed/checkpoint, of torch's version or one near it, of which FILES are run
where they are there; `expecttest` has to be importable. Nothing of it belongs into this repository.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

FILES = {
    "test_file_system_checkpoint_cpu.py": "",
    "test_planner.py": "TestLoadPlan",
    "test_compatibility.py": "",
    "test_format_utils.py": "NoDist",
}
"""Test files, and what the names of the classes contain that need neither a GPU nor more ranks."""


def put_ours_in_place() -> None:
    """From here on what this process imports as torch's FileSystemWriter and FileSystemReader is ours."""
    from torch.distributed.checkpoint import _storage_utils, filesystem, format_utils

    import torchcache as tc

    class FileSystemWriter(tc.CacheStorageWriter):
        """Takes what stock's takes; how many files and threads it makes is its own affair."""

        def __init__(
            self,
            path: str | os.PathLike[str],
            single_file_per_rank: bool = True,
            sync_files: bool = True,
            thread_count: int = 1,
            per_thread_copy_ahead: int = 10_000_000,
            cache_staged_state_dict: bool = False,
            overwrite: bool = True,
            _extensions: Any = None,
            serialization_format: Any = None,
        ) -> None:
            super().__init__(path, overwrite=overwrite, _extensions=_extensions)

    stock = {
        "FileSystemWriter": (filesystem.FileSystemWriter, FileSystemWriter),
        "FileSystemReader": (filesystem.FileSystemReader, tc.CacheStorageReader),
    }
    for module in (_storage_utils, format_utils, *sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torch.distributed"):
            for name, (theirs, ours) in stock.items():
                if vars(module).get(name) is theirs:
                    setattr(module, name, ours)


def run(folder: Path, who: Literal["stock", "ours"]) -> dict[str, str]:
    """Outcome ("pass", "fail" or "skip") by test."""
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            if not (folder / name).exists():
                print(f"{name} isn't there", file=sys.stderr)
                continue
            text = (folder / name).read_text()
            if who == "ours":  # ranks are spawned and import the file too
                text = f"import tests.stock_dcp\ntests.stock_dcp.put_ours_in_place()\n{text}"
            (Path(scratch) / name).write_text(text)
            outcomes |= _run_file(Path(scratch), name)
    return outcomes


def _run_file(folder: Path, name: str) -> dict[str, str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    report = folder / f"{name}.json"
    subprocess.run(
        [sys.executable, "-m", "tests.stock_dcp", "--one", name, str(report)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    outcomes: dict[str, str] = json.loads(report.read_text())
    return outcomes


def _run_here(name: str, report: Path) -> None:
    """The tests of one file, in this process."""
    tests = unittest.defaultTestLoader.loadTestsFromName(Path(name).stem)
    chosen = unittest.TestSuite(test for test in _flat(tests) if FILES[name] in type(test).__name__)
    outcomes = {test.id(): "pass" for test in _flat(chosen)}
    result = unittest.TextTestRunner(verbosity=2).run(chosen)
    outcomes |= {test.id(): "skip" for test, _ in result.skipped}
    outcomes |= {test.id(): "fail" for test, _ in result.failures + result.errors}
    report.write_text(json.dumps(outcomes))


def _flat(suite: unittest.TestSuite | unittest.TestCase) -> Iterator[unittest.TestCase]:
    if isinstance(suite, unittest.TestCase):
        yield suite
        return
    for part in suite:
        yield from _flat(part)


def main() -> int:
    if sys.argv[1] == "--one":
        _run_here(sys.argv[2], Path(sys.argv[3]))
        return 0
    folder = Path(sys.argv[1])
    ours, stock = run(folder, "ours"), run(folder, "stock")
    for who, outcomes in (("stock", stock), ("ours", ours)):
        passed = sum(outcome == "pass" for outcome in outcomes.values())
        print(f"{who}: {passed} of {len(outcomes)} pass")
    lost = [test for test, outcome in stock.items() if outcome == "pass" and ours.get(test) != "pass"]
    for test in lost:
        print(f"only with stock's: {test}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
