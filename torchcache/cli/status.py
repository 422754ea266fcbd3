"""`torchcache status`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.output import duration_text, percent_text, size_text
from torchcache.errors import ServerUnavailable

if TYPE_CHECKING:
    from torchcache.cli.output import Output
    from torchcache.pool import NamespaceStatus, ServerStatus


@click.command(epilog=EXIT_CODES, short_help="Show how the pool's servers are.")
@command
def status(session: Session) -> None:
    """Show how the pool's servers are, what they hold and what they asked of storage.

    Never starts a pool: exit code 3 if none runs. Counters run since each server started.
    """
    if session.uses_embedded_pool:
        from torchcache.embedded import is_running

        if not is_running():
            raise ServerUnavailable(
                "no embedded pool of yours runs on this machine: the first program to use it starts it"
            )
    servers = session.pool.status()
    session.output.document({"servers": [dataclasses.asdict(server) for server in servers]})
    if not session.output.as_json:
        _show(session.output, servers)


def _show(output: Output, servers: list[ServerStatus]) -> None:
    output.table(
        (
            "server",
            "up",
            ">used",
            ">capacity",
            ">hits",
            ">hit rate",
            ">served",
            ">to upload",
            ">corrupt",
            "store",
        ),
        [
            (
                s.address,
                duration_text(s.uptime_s),
                size_text(s.used_bytes),
                size_text(s.capacity_bytes),
                f"{s.hits:,}",
                percent_text(s.hits / (s.hits + s.misses)) if s.hits + s.misses else "-",
                size_text(s.served_bytes),
                size_text(s.upload_pending_bytes),
                f"{s.corrupt:,}",
                s.store_path,
            )
            for s in servers
        ],
    )
    output.table(
        (
            "under-store",
            "URI",
            "server",
            ">reads",
            ">read",
            ">writes",
            ">written",
            ">other requests",
            ">retries",
        ),
        [
            (
                u.name,
                u.uri,
                s.address,
                f"{u.read_requests:,}",
                size_text(u.read_bytes),
                f"{u.write_requests:,}",
                size_text(u.write_bytes),
                f"{u.meta_requests:,}",
                f"{u.retries:,}",
            )
            for s in servers
            for u in s.under_stores
        ],
    )
    held = [
        (n.name, s.address, size_text(n.bytes), f"{n.chunks:,}", _notes(n))
        for s in servers
        for n in s.namespaces
    ]
    if held:
        output.table(("dataset or checkpoint", "server", ">bytes", ">chunks", "notes"), sorted(held))


def _notes(namespace: NamespaceStatus) -> str:
    notes = [("pinned", namespace.pinned), ("not yet durable", namespace.dirty)]
    return ", ".join(note for note, applies in notes if applies)
