"""An embedded pool that nobody wants anything of once the test is over."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torchcache as tc
from torchcache.embedded import read_endpoint


@contextmanager
def throwaway(local: tc.LocalPool, root: Path) -> Iterator[tc.Pool]:
    """The pool in `root`, whose servers are killed at the end.

    Stopped in order they would go on uploading for 40 s what their tests left, to buckets that went with the tests.
    """
    with local as pool:
        yield pool
        for folder in root.glob("server-*"):
            if described := read_endpoint(folder):
                with suppress(ProcessLookupError):
                    os.kill(described["pid"], signal.SIGKILL)
