"""Figures of what a run has proven: docs/reliability.md is made of them, by `make reliability`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def commit() -> str:
    """The commit of this tree, with "-dirty" if it isn't quite that. Raises OSError, CalledProcessError."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


_FOLDER = os.environ.get("TORCHCACHE_PROOFS")  # read at import: tests run without any TORCHCACHE_ variable
_COMMIT = "" if _FOLDER is None else commit()  # of what is imported, whatever is checked out meanwhile


@contextmanager
def proof(name: str, **known: int | float | str) -> Iterator[dict[str, int | float | str]]:
    """Notes what the block proves, and its wall time, under `name`: put counts and seeds into the dictionary, beside
    the `known`. As a decorator it is of the whole test.

    Only a block that doesn't raise counts. Without `TORCHCACHE_PROOFS`, a folder, nothing is written.
    """
    figures = dict(known)
    started_s = time.monotonic()
    yield figures
    if _FOLDER is not None:
        wall_s = round(time.monotonic() - started_s, 1)
        line = json.dumps({"proof": name, **figures, "wall_s": wall_s, "commit": _COMMIT})
        Path(_FOLDER).mkdir(parents=True, exist_ok=True)
        with Path(_FOLDER, f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
