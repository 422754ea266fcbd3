"""What all commands share: the options --pool and --json, exit codes, and errors in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import click

from torchcache import environment
from torchcache.cli.output import Output
from torchcache.errors import ConfigurationError, TorchCacheError, TransientError

if TYPE_CHECKING:
    from torchcache.pool import Pool

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done, or it is so; 1 it failed, or is not so (nothing there, damaged, not committed); 2 wrong usage "
    "or configuration; 3 no pool runs, or it can't be reached or is overloaded: try again; 130 interrupted."
)

POOL_METAVAR = "ADDRESS"
POOL_HELP = (
    "The pool's servers: HOST:PORT and unix:///PATH, one or more with commas between; or where they are found: "
    "etcd://HOST:PORT/NAME, dns://NAME:PORT."
)

_Arguments = ParamSpec("_Arguments")


class Session:
    """One run of a command: where it prints, and the pool it asks, connected at first use."""

    def __init__(self, output: Output, address: str | None) -> None:
        self.output = output
        self.address = address

    @property
    def uses_embedded_pool(self) -> bool:
        """Neither an option nor the environment names a pool."""
        return not (self.address or environment.pool_address())

    @functools.cached_property
    def pool(self) -> Pool:
        from torchcache.connecting import connect

        return connect(self.address)


def command(function: Callable[Concatenate[Session, _Arguments], int | None]) -> Callable[..., int]:
    """Gives a command --pool and --json, a `Session`, and its exit code; for use under `click.command`.

    With --json exactly one JSON document goes to stdout: the result, or {"error": ...}.
    """

    @functools.wraps(function)
    def wrapper(*, pool_address: str | None, as_json: bool, **arguments: Any) -> int:
        output = Output(as_json=as_json)
        try:
            return function(Session(output, pool_address), **arguments) or 0  # type: ignore[call-arg]
        except TorchCacheError as error:
            output.error(error)
            return exit_code(error)

    wrapper = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(wrapper)
    return click.option(
        "--pool",
        "pool_address",
        metavar=POOL_METAVAR,
        help=f"{POOL_HELP} Default: $TORCHCACHE_POOL, else the embedded pool.",
    )(wrapper)


def exit_code(error: TorchCacheError) -> int:
    """The exit code an error stands for."""
    if isinstance(error, TransientError):
        return EXIT_UNAVAILABLE
    return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILED
