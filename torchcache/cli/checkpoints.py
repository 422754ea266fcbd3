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
    from torchcache.checkpoint.verification import Place


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
    """Read every byte of the checkpoint at URI in each place there is, and check it against its manifest.

    The places are the servers of the pool that hold it or a part, each asked for its own copy, and storage, once it is
    durable. A server may have freed some of its copy by then; before, each holder has to have all of it. What the pool
    caches of the files in storage is evicted first, unless it is pinned, so that they are read from storage.

    Exit code 1 if a byte is missing or wrong in any place, if a server can't be asked, or if there is no committed
    checkpoint; 3 if storage can't be read now.
    """
    from torchcache.checkpoint.catalog import committed_parts, state_of
    from torchcache.checkpoint.hold import Hold
    from torchcache.checkpoint.manifest import Manifest
    from torchcache.checkpoint.verification import verify_save

    start_s = time.monotonic()
    saves = committed_parts(session.pool, uri)
    manifests = [Manifest.decode(save.manifest, where=uri) for save in saves]
    servers = session.pool.servers()
    rounds = [len(servers) + (save.state == "durable") for save in saves]
    items = sum(len(m.items) for m in manifests)
    sizes = [sum(item.length for item in m.items) for m in manifests]
    places: list[tuple[str, Place]] = []
    with session.output.progress(
        "verifying",
        items=sum(len(m.items) * times for m, times in zip(manifests, rounds, strict=True)),
        total_bytes=sum(size * times for size, times in zip(sizes, rounds, strict=True)),
    ) as advance:
        for save, manifest in zip(saves, manifests, strict=True):
            hold = Hold(session.pool, save)
            hold.take()
            with hold.kept():
                found = verify_save(session.pool, save, manifest, on_progress=advance, servers=servers)
            places += [(save.part, place) for place in found]
    took_s = time.monotonic() - start_s
    faults = [fault for _, place in places for fault in place.faults]
    read_bytes = sum(place.held_bytes for _, place in places)
    session.output.document(
        {
            "uri": uri,
            "ok": not faults,
            "parts": [{"part": s.part, "state": state_of(s), "save_id": s.save_id} for s in saves],
            "items": items,
            "bytes": sum(sizes),
            "read_bytes": read_bytes,
            "seconds": round(took_s, 3),
            "places": [
                {
                    "place": place.name,
                    "part": part,
                    "ok": not place.faults,
                    "bytes": place.held_bytes,
                    "missing_bytes": place.missing_bytes,
                }
                for part, place in places
            ],
            "faults": [
                {"place": f.place, "file": f.file, "item": f.item, "error": str(f.error)} for f in faults
            ],
        }
    )
    for part, place in places:
        session.output.text(f"{place.name}{f' ({part})' if part else ''}: {_found(place)}")
    for fault in faults:
        session.output.text(f"bad: {fault.place}: {f'{fault.file}: ' if fault.file else ''}{fault.error}")
    states = ", ".join(sorted({state_of(s) for s in saves}))
    session.output.text(
        f"{uri} ({states}) is {f'damaged: {len(faults)} faults' if faults else 'good'}; "
        f"{items:,} items, {size_text(read_bytes)} read in {duration_text(took_s)}"
    )
    return EXIT_FAILED if faults else 0


def _found(place: Place) -> str:
    held = f"{size_text(place.held_bytes)} read"
    missing = f", {size_text(place.missing_bytes)} not there" if place.missing_bytes else ""
    return f"{'bad' if place.faults else 'good'}, {held}{missing}"
