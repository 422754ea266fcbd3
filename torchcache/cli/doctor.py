"""`torchcache doctor`: of stores, and of this machine as a client of a pool."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

import click

from torchcache import environment
from torchcache.cli.command import EXIT_CODES, EXIT_FAILED, POOL_HELP, POOL_METAVAR, exit_code
from torchcache.cli.output import Alert, Output
from torchcache.errors import TorchCacheError


@click.command(
    epilog=EXIT_CODES,
    short_help="Check this machine as a client; check and repair the stores of servers that don't run.",
)
@click.option(
    "--store",
    "stores",
    metavar="DIR",
    multiple=True,
    help="Folder of a server's store; repeatable. Default: those of the embedded pool.",
)
@click.option("--repair", is_flag=True, help="Repair what can be. Nothing that must be kept is removed.")
@click.option(
    "--client",
    is_flag=True,
    help="Check this machine as a client of the pool. So does --pool, or $TORCHCACHE_POOL without --store.",
)
@click.option("--pool", "pool_address", metavar=POOL_METAVAR, help=POOL_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(
    stores: tuple[str, ...], *, repair: bool, client: bool, pool_address: str | None, as_json: bool
) -> int:
    """Check this machine as a client of a pool, or the stores of servers.

    As a client: credentials and whether others can read them, each server's reachability, lane, answer, version, clock
    and disk, and this machine's limits and disk, with advice. Exit code 1 if something keeps it from using the pool.

    Of stores: read every byte of one that no server has open, and say what is damaged and what becomes of it. Without
    --repair nothing is written. With it, what is damaged is mended from a copy, or made so that it is fetched again; a
    checkpoint that exists nowhere else is never touched: what is left of it stays. Exit code 1 if damage is left, 2 if
    a store can't be checked, say because a server runs on it.
    """
    if client or pool_address:
        if stores or repair:
            raise click.UsageError(
                "--store and --repair are for stores, --client and --pool for this machine"
            )
        return _check_client(pool_address, Output(as_json=as_json))
    if environment.pool_address() and not stores and not repair:
        return _check_client(None, Output(as_json=as_json))
    arguments = [f"--store={store}" for store in stores or _embedded_stores()]
    arguments += ["--repair"] * repair + ["--json"] * as_json
    sys.stdout.flush()
    command = [sys.executable, "-m", "torchcache_server.process.doctor", *arguments]
    os.execv(sys.executable, command)  # noqa: S606


def _check_client(address: str | None, output: Output) -> int:
    from torchcache.cli.client_doctor import diagnose
    from torchcache.connecting import connect

    try:
        pool = connect(address)
    except TorchCacheError as error:
        output.error(error)
        return exit_code(error)
    found = list(diagnose(pool))
    pool.close()
    sound = all(one.state != "problem" for one in found)
    output.document({"sound": sound, "findings": [asdict(one) for one in found]})
    output.table(
        ("check", "of", "", "what", "advice"),
        [
            (one.check, one.about, one.state if one.state == "ok" else Alert(one.state), one.what, one.advice)
            for one in found
        ],
    )
    return 0 if sound else EXIT_FAILED


def _embedded_stores() -> list[str]:
    """Folders of the embedded pool's stores. Raises UsageError if there are none."""
    from torchcache.local_pool import default_root

    root = default_root()
    found = [str(path) for path in sorted(root.glob("server-*/store"))]
    if not found:
        raise click.UsageError(f"there is no store of the embedded pool in {root}: give --store")
    return found
