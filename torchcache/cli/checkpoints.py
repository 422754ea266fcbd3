"""`torchcache checkpoint`: ls, verify; wait, rm and export stand in files of their own."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from torchcache.cli.checkpoint_export import checkpoint_export
from torchcache.cli.checkpoint_upkeep import checkpoint_rm, checkpoint_wait
from torchcache.cli.command import EXIT_CODES, EXIT_FAILED, Session, command
from torchcache.cli.objects import is_there
from torchcache.cli.output import duration_text, size_text
from torchcache.errors import ObjectNotFound

if TYPE_CHECKING:
    from torchcache.checkpoint.verification import Fault


@click.group()
def checkpoint() -> None:
    """List, verify, await, delete and export checkpoints."""


checkpoint.add_command(checkpoint_wait)
checkpoint.add_command(checkpoint_rm)
checkpoint.add_command(checkpoint_export)


@checkpoint.command("ls", epilog=EXIT_CODES, short_help="List checkpoints in the pool and in storage.")
@click.argument("uri")
@command
def checkpoint_ls(session: Session, uri: str) -> None:
    """List the checkpoints at and below URI, in the pool and in storage, and how far they are.

    States: saving (not committed yet), cached (safe on the disk of one server of the pool), replicated (of several),
    durable (safe in storage), failed (in the pool; the upload met an error), stock (in storage, saved by torch without
    torchcache), unfinished (being written or deleted by another pool, or left so: rm takes it away).

    Exit code 1 if there is nothing at all at URI, neither checkpoints nor anything else.
    """
    from torchcache.checkpoint.catalog import list_checkpoints

    found = list_checkpoints(session.pool, uri)
    if not found and not is_there(session.pool, uri):
        raise ObjectNotFound(
            f"neither the pool nor storage has anything at {uri}; check the name", object=uri
        )
    session.output.document({"uri": uri, "checkpoints": [asdict(one) for one in found]})
    if not found:
        session.output.text(f"no checkpoints under {uri}")
        return
    session.output.table(
        ("checkpoint", "part", "state", ">size", ">to upload", ">waiting", ">servers", "error"),
        [
            (
                one.uri,
                one.part,
                one.state,
                size_text(one.bytes) if one.bytes else "-",
                size_text(one.pending_bytes) if one.pending_bytes else "-",
                duration_text(one.waiting_s) if one.waiting_s else "-",
                str(one.replicas or "-"),
                one.error,
            )
            for one in found
        ],
    )


@checkpoint.command("verify", epilog=EXIT_CODES, short_help="Check every byte of a checkpoint.")
@click.argument("uri")
@command
def checkpoint_verify(session: Session, uri: str) -> int:
    """Read every byte of the checkpoint at URI and check it against its manifest.

    A durable checkpoint is read as it lies in storage, through the pool's cache; one that is still uploading, from the
    pool. Exit code 1 if a byte is missing or wrong, or if there is no committed checkpoint.
    """
    from torchcache.checkpoint.catalog import committed_parts, state_of
    from torchcache.checkpoint.hold import Hold
    from torchcache.checkpoint.manifest import Manifest
    from torchcache.checkpoint.verification import verify_save

    start_s = time.monotonic()
    saves = committed_parts(session.pool, uri)
    manifests = [Manifest.decode(save.manifest, where=uri) for save in saves]
    items = sum(len(m.items) for m in manifests)
    total_bytes = sum(item.length for m in manifests for item in m.items)
    faults: list[Fault] = []
    with session.output.progress("verifying", items=items, total_bytes=total_bytes) as advance:
        for save, manifest in zip(saves, manifests, strict=True):
            hold = Hold(session.pool, save)
            hold.take()
            with hold.kept():
                faults += verify_save(session.pool, save, manifest, on_progress=advance)
    took_s = time.monotonic() - start_s
    session.output.document(
        {
            "uri": uri,
            "ok": not faults,
            "parts": [{"part": s.part, "state": state_of(s), "save_id": s.save_id} for s in saves],
            "items": items,
            "bytes": total_bytes,
            "seconds": round(took_s, 3),
            "faults": [{"file": f.file, "item": f.item, "error": str(f.error)} for f in faults],
        }
    )
    for fault in faults:
        session.output.text(f"bad: {fault.file}: {fault.error}")
    states = ", ".join(sorted({state_of(s) for s in saves}))
    session.output.text(
        f"{uri} ({states}) is {f'damaged: {len(faults)} faults' if faults else 'good'}; "
        f"{items:,} items, {size_text(total_bytes)} read in {duration_text(took_s)}"
    )
    return EXIT_FAILED if faults else 0
