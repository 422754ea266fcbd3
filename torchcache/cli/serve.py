"""`torchcache serve`."""

from __future__ import annotations

import os
import sys

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
    short_help="Run a cache server.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run a cache server; `torchcache serve --help` tells its options."""
    sys.stdout.flush()
    # The server takes this process's place, so that signals, and its exit code, are its own.
    os.execv(sys.executable, [sys.executable, "-m", "torchcache_server", *arguments])  # noqa: S606
