"""Fifty asynchronous saves, each instead of the last, take no more than the first few did: memory, disk, all else."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.e2e import growing


@pytest.mark.parametrize(
    ("saves", "in_process"),
    [
        (10, False),
        pytest.param(50, False, marks=pytest.mark.long),
        pytest.param(10, True, marks=pytest.mark.long),
    ],
)
def test_saves_take_no_more_than_the_first_few(
    tmp_path: Path, saves: int, in_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: this one may have freed memory that it would take from.

    With one heap, as what malloc keeps in those of threads is bounded, but comes bit by bit.
    """
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    process = multiprocessing.get_context("spawn").Process(
        target=growing.main, args=(str(tmp_path), saves), kwargs={"in_process": in_process}
    )
    process.start()
    process.join(550)
    process.kill()
    assert process.exitcode == 0
