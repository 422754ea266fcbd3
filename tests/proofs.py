"""Figures of what a run has proven: docs/reliability.md is made of them, by `make reliability`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = os.environ.get("TORCHCACHE_PROOFS")  # read at import: tests run without any TORCHCACHE_ variable


@contextmanager
def proof(name: str) -> Iterator[dict[str, int | float | str]]:
    """Notes what the block proves, and its wall time, under `name`: put counts and seeds into the dictionary.

    Only a block that doesn't raise counts. Without `TORCHCACHE_PROOFS`, a folder, nothing is written.
    """
    figures: dict[str, int | float | str] = {}
    started_s = time.monotonic()
    yield figures
    if _FOLDER is not None:
        line = json.dumps({"proof": name, **figures, "wall_s": round(time.monotonic() - started_s, 1)})
        Path(_FOLDER).mkdir(parents=True, exist_ok=True)
        with Path(_FOLDER, f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
