"""The command `torchcache`. Starts fast: what a command needs is imported when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command with the process's arguments, and exits with its code."""
    from torchcache.cli.app import run

    sys.exit(run(sys.argv[1:]))
