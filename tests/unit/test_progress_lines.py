"""Progress without a terminal: a line now and then, and none of work that is quick."""

from __future__ import annotations

from torchcache.pool.progress_lines import ProgressLines


def test_lines_come_now_and_then() -> None:
    now = [0.0]
    said: list[str] = []
    lines = ProgressLines("staging", 200, said.append, clock=lambda: now[0])
    for _ in range(100):
        now[0] += 0.25
        lines(1, 1_000_000)
    assert said == [
        "staging: 40 of 200 (20%), 40 MB at 4 MB/s, 40 s to go",
        "staging: 80 of 200 (40%), 80 MB at 4 MB/s, 30 s to go",
    ]
