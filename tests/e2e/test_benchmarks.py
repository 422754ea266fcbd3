"""The benchmarks keep running: one tiny round of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_tiny_round(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--tiny", f"--json={out}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    figures = json.loads(out.read_text())
    assert figures["machine"]["cores"]
    for comparison in figures["flight_lane"]:
        assert comparison["ours"]["bytes"] == comparison["bare_one"]["bytes"] > 0
        assert comparison["ratio"] > 0
    for cost in figures["verification"]:
        assert cost["verified"]["bytes"] == cost["unverified"]["bytes"] > 0
        assert cost["share"] < 1
    for start in figures["start_up"]:
        assert start["segments"] > 0
        assert min(start["clean_s"], start["killed_s"], start["no_index_s"]) > 0
