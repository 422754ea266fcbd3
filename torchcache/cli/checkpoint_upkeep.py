"""`torchcache checkpoint wait` and `rm`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from torchcache.cli.command import EXIT_CODES, EXIT_FAILED, Session, command
from torchcache.cli.durations import parse_duration
from torchcache.cli.output import duration_text, size_text
from torchcache.errors import NotCommitted

if TYPE_CHECKING:
    from torchcache.checkpoint.catalog import Checkpoint
    from torchcache.pool import Pool


@click.command("wait", epilog=EXIT_CODES, short_help="Wait until checkpoints are safe in storage.")
@click.argument("uri")
@click.option("--timeout", metavar="TIME", help='Give up after so long, like "10m". Default: never.')
@command
def checkpoint_wait(session: Session, uri: str, timeout: str | None) -> int:
    """Wait until every committed checkpoint at and below URI is durable: uploaded to storage.

    Exit code 1 if there is none, or an upload failed; 3 if the time is over, or nothing moved for ten minutes.
    """
    from torchcache.checkpoint.catalog import list_checkpoints
    from torchcache.checkpoint.durable import wait_until_durable

    timeout_s = parse_duration(timeout) if timeout else None
    start_s = time.monotonic()
    waited = [c for c in list_checkpoints(session.pool, uri) if c.state not in ("saving", "unfinished")]
    if not waited:
        raise NotCommitted(f"there is no committed checkpoint at {uri}", object=uri)
    pending = [c for c in waited if c.state not in ("durable", "stock")]
    total_bytes = sum(c.pending_bytes for c in pending)
    with session.output.progress("uploading", items=len(pending), total_bytes=total_bytes) as advance:
        for one in pending:
            left = one.pending_bytes

            def show(pending_bytes: int) -> None:
                nonlocal left
                advance(0, max(0, left - pending_bytes))
                left = min(left, pending_bytes)

            rest_s = None if timeout_s is None else max(0.0, start_s + timeout_s - time.monotonic())
            save = session.pool.get_save(*session.pool.resolve(one.uri), one.part, manifest=False)
            wait_until_durable(session.pool, save, timeout_s=rest_s, on_progress=show)
            advance(1, left)
    took_s = time.monotonic() - start_s
    session.output.document(
        {
            "uri": uri,
            "checkpoints": [{"uri": c.uri, "part": c.part} for c in waited],
            "waited_for": len(pending),
            "seconds": round(took_s, 3),
        }
    )
    count = f"{len(waited)} checkpoint{'' if len(waited) == 1 else 's'}"
    session.output.text(f"{count} under {uri}: durable after {duration_text(took_s)}")
    return 0


@click.command("rm", epilog=EXIT_CODES, short_help="Delete checkpoints, in the pool and in storage.")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@command
def checkpoint_rm(session: Session, uris: tuple[str, ...], *, yes: bool) -> int:
    """Delete the checkpoint at each URI: its copy in the pool, and its files in storage, the manifest first.

    Also what is left of one that was never finished. Not one that is being written, or read. On a terminal it asks
    first. Exit code 1 if one could not be deleted, or is not there; the others are.
    """
    found = {uri: _at(session.pool, uri) for uri in dict.fromkeys(uris)}
    if not yes and not session.output.as_json and sys.stdin.isatty():
        for uri, parts in found.items():
            session.output.text(f"{uri}: {_described(parts)}")
        click.confirm("Delete?", abort=True, err=True)
    results: list[dict[str, object]] = []
    for uri, parts in found.items():
        error = _delete(session.pool, uri, parts)
        results.append({"uri": uri, "deleted": error is None, "error": error})
        if error is None:
            session.output.text(f"deleted {uri}")
        else:
            session.output.warning(error)
    session.output.document({"checkpoints": results})
    return 0 if all(result["deleted"] for result in results) else EXIT_FAILED


def _at(pool: Pool, uri: str) -> list[Checkpoint]:
    """The checkpoint at just this URI, or its parts."""
    from torchcache.checkpoint.catalog import list_checkpoints
    from torchcache.errors import ObjectNotFound

    try:
        return [
            c for c in list_checkpoints(pool, uri) if pool.resolve(c.uri) == pool.resolve(uri.rstrip("/"))
        ]
    except ObjectNotFound:
        return []


def _described(parts: list[Checkpoint]) -> str:
    if not parts:
        return "nothing"
    return f"{parts[0].state}, {size_text(sum(part.bytes for part in parts))}"


def _delete(pool: Pool, uri: str, parts: list[Checkpoint]) -> str | None:
    """Why it could not be deleted; None if it was."""
    from torchcache.errors import TorchCacheError, TransientError

    if not parts:
        return f"there is no checkpoint at {uri}"
    if any(part.state == "stock" for part in parts):
        return f"{uri} was saved by torch without torchcache: delete its files with the tools of the storage"
    try:
        for part in parts:
            pool.delete_save(*pool.resolve(part.uri), part.part)
    except TransientError:
        raise
    except TorchCacheError as error:
        return str(error)
    return None
