"""The example of text: it trains from S3, and goes on after a stop as if nothing had been."""

from __future__ import annotations

import re
import sys

import pytest

from examples import train_text
from examples.seaweedfs import SeaweedFS


def test_it_goes_on_where_it_was_stopped(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3.make_bucket()

    def run(name: str, steps: int) -> str:
        arguments = [f"s3://{bucket}/corpus", f"s3://{bucket}/{name}", "--stop-after", str(steps)]
        monkeypatch.setattr(sys, "argv", ["train_text", *arguments])
        train_text.main()
        return capsys.readouterr().out

    [expected] = re.findall(r"stopped behind step 16: weights \w+", run("a", 16))
    run("b", 13)
    rest = run("b", 16)
    assert "resumed behind step 10 of epoch 0" in rest
    assert expected in rest
