"""`make demo-cluster` as it is: what it claims holds, and `status --watch` shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.etcd import Etcd

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(not Etcd.installed(), reason="no etcd here: apt-get install etcd-server")
def test_a_server_that_is_killed_is_seen_and_harms_no_training(tmp_path: Path) -> None:
    """F1. It checks its claims itself and says so in the end; the tables are those that --watch printed meanwhile."""
    found = subprocess.run(
        [sys.executable, "-m", "examples.demo_cluster"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'server'}", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert "All of it held." in found.stdout
    before, killed, after = found.stdout.partition("kill -9 to one of the servers")
    assert killed
    assert "4 servers answer" in before and "3 servers answer" not in before
    assert "3 servers answer" in after and "4 servers answer" not in after
    for part in (before, after):
        assert "newest checkpoints" in part
        assert "s3://cluster/digits" in part
    assert "durable" in after.rpartition("newest checkpoints")[2].partition("checkpoints at")[0]
