"""The command group, and what becomes of errors."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from torchcache import __version__
from torchcache.cli.checkpoints import checkpoint
from torchcache.cli.command import EXIT_CODES, EXIT_FAILED, EXIT_INTERRUPTED
from torchcache.cli.doctor import doctor
from torchcache.cli.drain import drain
from torchcache.cli.index import index
from torchcache.cli.keygen import keygen
from torchcache.cli.listing import ls
from torchcache.cli.policies import evict, limit, pin, unpin
from torchcache.cli.serve import serve
from torchcache.cli.stage import stage
from torchcache.cli.status import status


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="torchcache")
@click.option("--traceback", is_flag=True, help="Show the full trace of an unexpected error.")
def cli(*, traceback: bool) -> None:
    """The layer between object storage and PyTorch.

    A pool of cache servers holds datasets and checkpoints close to the GPUs. Commands use the pool at --pool, else at
    $TORCHCACHE_POOL, else the embedded pool of this user on this machine, which starts when it is needed.
    """


for _command in (
    serve,
    status,
    stage,
    index,
    ls,
    pin,
    unpin,
    evict,
    limit,
    checkpoint,
    drain,
    doctor,
    keygen,
):
    cli.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; errors are printed, in one line each."""
    try:
        code = cli.main(list(arguments), prog_name="torchcache", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("torchcache: interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, like `head`, has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug is one line too, unless asked
        if "--traceback" in arguments:
            traceback.print_exc()
        click.echo(
            f"torchcache: unexpected {type(error).__name__}: {error} (--traceback tells more)", err=True
        )
        return EXIT_FAILED
    return code if isinstance(code, int) else 0
