"""The examples: each trains from S3, and goes on after a stop as if nothing had been."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from examples import train_images, train_tabular, train_text
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
