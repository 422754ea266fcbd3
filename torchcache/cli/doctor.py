"""`torchcache doctor`."""

from __future__ import annotations

import os
import sys

import click

from torchcache.cli.command import EXIT_CODES


@click.command(epilog=EXIT_CODES, short_help="Check and repair the stores of servers that don't run.")
@click.option(
    "--store",
    "stores",
    metavar="DIR",
    multiple=True,
    help="Folder of a server's store; repeatable. Default: those of the embedded pool.",
)
@click.option("--repair", is_flag=True, help="Repair what can be. Nothing that must be kept is removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(stores: tuple[str, ...], *, repair: bool, as_json: bool) -> None:
    """Read every byte of a store that no server has open, and say what is damaged and what becomes of it.

    Without --repair nothing is written. With it, what is damaged is mended from a copy, or made so that it is fetched
    again; a checkpoint that exists nowhere else is never touched: what is left of it stays. Exit code 1 if damage is
    left, 2 if a store can't be checked, say because a server runs on it.
    """
    arguments = [f"--store={store}" for store in stores or _embedded_stores()]
    arguments += ["--repair"] * repair + ["--json"] * as_json
    sys.stdout.flush()
    command = [sys.executable, "-m", "torchcache_server.process.doctor", *arguments]
    os.execv(sys.executable, command)  # noqa: S606


def _embedded_stores() -> list[str]:
    """Folders of the embedded pool's stores. Raises UsageError if there are none."""
    from torchcache.local_pool import default_root

    root = default_root()
    found = [str(path) for path in sorted(root.glob("server-*/store"))]
    if not found:
        raise click.UsageError(f"there is no store of the embedded pool in {root}: give --store")
    return found
