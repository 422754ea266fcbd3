"""Training that is killed with SIGKILL and started again ends with the weights of training that never was."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.seaweedfs import SeaweedFS, environment

ROOT = Path(__file__).parents[2]
EPOCHS = 3
IMAGES = 96
STEPS = EPOCHS * IMAGES // 8
# Right after the save at an epoch's end, and in the last epoch.
KILL_POINTS = (12, 30)


@pytest.fixture(scope="module")
def bucket(s3_server: SeaweedFS) -> str:
    name = s3_server.make_bucket()
    for i in range(IMAGES):
        png = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(png, format="PNG")
        s3_server.client.put_object(Bucket=name, Key=f"digits/{i % 10}/{i:04d}.png", Body=png.getvalue())
    return name


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory, s3_server: SeaweedFS) -> Iterator[dict[str, str]]:
    """One embedded pool for all runs of this module, as for one user's jobs on one machine."""
    variables = {**s3_server.environment(), "TORCHCACHE_HOME": str(tmp_path_factory.mktemp("home"))}
    with environment(variables):
        yield variables


def train(bucket: str, run: str, *, kill_at: int | None = None) -> list[dict[str, Any]]:
    """The events of one process of the example; with `kill_at`, it is SIGKILLed right after that step."""
    command = [sys.executable, "-m", "examples.train_digits", f"s3://{bucket}/digits", f"s3://{bucket}/{run}"]
    command += ["--events", f"--epochs={EPOCHS}", "--batch-size=8", "--save-every=4", "--width=32"]
    events = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if kill_at is not None and events[-1].get("step", 0) >= kill_at:
                process.kill()
                break
    assert kill_at is not None or process.returncode == 0
    return events


@pytest.fixture(scope="module")
def expected_weights(bucket: str, shared_home: dict[str, str]) -> str:
    events = train(bucket, "whole")
    assert events[-1]["event"] == "done"
    assert events[-1]["step"] == STEPS
    return str(events[-1]["weights"])


def test_killed_twice_and_resumed_equals_uninterrupted(
    bucket: str, shared_home: dict[str, str], expected_weights: str
) -> None:
    """The second kill is of a run that was resumed."""
    check_kills_at(bucket, shared_home, expected_weights, "killed-twice", *KILL_POINTS)


@pytest.mark.long
@pytest.mark.parametrize("round_", range(20))
def test_killed_anywhere_and_resumed(
    bucket: str, shared_home: dict[str, str], expected_weights: str, round_: int
) -> None:
    kill_at = random.Random(round_).randrange(1, STEPS)
    check_kills_at(bucket, shared_home, expected_weights, f"killed-{round_}-at-{kill_at}", kill_at)


def check_kills_at(
    bucket: str, shared_home: dict[str, str], expected_weights: str, run: str, *kill_points: int
) -> None:
    with environment(shared_home):
        lives = [train(bucket, run, kill_at=kill_at) for kill_at in (*kill_points, None)]
    saved = 0
    for killed, resuming in itertools.pairwise(lives):
        assert killed[-1]["event"] != "done"
        resumed = [e["step"] for e in resuming if e["event"] == "resume"]
        saved = max([saved, *(e["step"] for e in killed if e["event"] == "save")])
        # What was acknowledged is there; a save the kill came upon may have been committed, unheard.
        assert resumed or not saved
        assert all(step >= saved and step % 4 == 0 for step in resumed)
        steps = [e["step"] for e in resuming if e["event"] == "step"]
        reached = max(e["step"] for e in resuming if "step" in e)
        assert steps == list(range(resumed[0] + 1 if resumed else 1, reached + 1))
    assert reached == STEPS
    assert lives[-1][-1]["weights"] == expected_weights
