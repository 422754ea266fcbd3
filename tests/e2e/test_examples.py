"""The examples: each trains from S3, and goes on after a stop as if nothing had been."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from types import ModuleType

import pytest

from examples import train_images, train_tabular, train_text
from examples.demo import digits
from examples.seaweedfs import SeaweedFS


@pytest.mark.parametrize(
    ("example", "steps", "stop", "saved", "epoch"),
    [(train_text, 16, 13, 10, 0), (train_images, 13, 11, 8, 0), (train_tabular, 24, 22, 20, 1)],
    ids=["text", "images", "tabular"],
)
def test_it_goes_on_where_it_was_stopped(
    s3: SeaweedFS,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    example: ModuleType,
    steps: int,
    stop: int,
    saved: int,
    epoch: int,
) -> None:
    bucket = s3.make_bucket()

    def run(name: str, stop_after: int) -> str:
        arguments = [f"s3://{bucket}/data", f"s3://{bucket}/{name}", "--stop-after", str(stop_after)]
        monkeypatch.setattr(sys, "argv", [example.__name__, *arguments, "--workers", "1"])
        example.main()
        return capsys.readouterr().out

    [expected] = re.findall(rf"stopped behind step {steps}: weights \w+", run("a", steps))
    run("b", stop)
    rest = run("b", steps)
    assert f"resumed behind step {saved} of epoch {epoch}" in rest
    assert expected in rest


@pytest.mark.long
def test_ranks_go_on_from_the_checkpoint_that_they_saved_together(s3: SeaweedFS) -> None:
    bucket = s3.make_bucket()
    for name, png in itertools.islice(digits(), 300):
        s3.client.put_object(Bucket=bucket, Key=f"digits/{name}", Body=png)

    def run(name: str, epochs: int) -> list[dict[str, object]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [
            "-m",
            "examples.train_ranks",
            f"s3://{bucket}/digits",
            f"s3://{bucket}/{name}",
            "--events",
        ]
        command += [f"--epochs={epochs}", "--save-every=4", "--width=32"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        return [json.loads(line) for line in said.stdout.splitlines()]

    [expected] = [event for event in run("whole", 2) if event["event"] == "done"]
    run("twice", 1)
    rest = run("twice", 2)
    assert rest[0] == {"event": "resume", "step": 4}
    assert rest[-1] == expected
