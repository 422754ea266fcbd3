"""What README.md shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from examples.seaweedfs import SeaweedFS

ROOT = Path(__file__).parents[2]


def test_the_readmes_first_example_runs_and_goes_on_when_started_again(tmp_path: Path, s3: SeaweedFS) -> None:
    [example] = re.findall(r"```python\n(import tempfile.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = f"s3://{s3.make_bucket()}/run"
    assert example.count("tempfile.mkdtemp()") == 1
    script = tmp_path / "example.py"
    script.write_text(example.replace("tempfile.mkdtemp()", repr(run)))
    saved = []
    for _ in ("first", "again"):
        done = subprocess.run(
            [sys.executable, script], check=False, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        saved.append(re.findall(rf"epoch (\d) is done, and saved under {run}", done.stdout))
    assert saved == [["0", "1", "2"], []]


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(documents) > 6
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
