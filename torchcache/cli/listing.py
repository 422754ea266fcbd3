"""`torchcache ls`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.objects import folder_uri, objects_under
from torchcache.cli.output import percent_text, size_text

if TYPE_CHECKING:
    from torchcache.pool import Pool


@dataclass(slots=True)
class Entry:
    """A file, or a folder (its name ends in a slash) with all that lies below it."""

    name: str
    objects: int = 0
    bytes: int = 0
    resident_bytes: int = 0

    def add(self, size: int, resident_bytes: int) -> None:
        self.objects += 1
        self.bytes += size
        self.resident_bytes += resident_bytes


@click.command(epilog=EXIT_CODES, short_help="Show objects, and how much of them the pool holds.")
@click.argument("uri", required=False)
@click.option("-r", "--recursive", is_flag=True, help="Show every object instead of folders.")
@command
def ls(session: Session, uri: str | None, *, recursive: bool) -> None:
    """Show what lies under URI in storage, and how much of it the pool holds.

    Without URI: the under-stores the pool can reach.
    """
    if uri is None:
        _show_under_stores(session)
        return
    entries, total = list_entries(session.pool, uri, recursive=recursive)
    session.output.document(
        {"uri": uri, "total": asdict(total), "entries": [asdict(entry) for entry in entries]}
    )
    session.output.table(
        ("name", ">objects", ">size", ">in the pool"),
        [
            (
                entry.name,
                f"{entry.objects:,}",
                size_text(entry.bytes),
                percent_text(entry.resident_bytes / entry.bytes) if entry.bytes else "-",
            )
            for entry in [*entries, total]
        ],
    )


def list_entries(pool: Pool, uri: str, *, recursive: bool) -> tuple[list[Entry], Entry]:
    """The children of `uri`, or with `recursive` all objects below it, as listed; and their total."""
    folder = folder_uri(pool, uri)
    objects = objects_under(pool, uri)
    entries: dict[str, Entry] = {}
    total = Entry("total")
    for object, resident_bytes in zip(objects, pool.resident_bytes(objects), strict=True):
        path = pool.uri(object.id)
        name = path.removeprefix(folder) if path.startswith(folder) else path.rpartition("/")[2]
        if not recursive:
            child, slash, _ = name.partition("/")
            name = child + slash
        entries.setdefault(name, Entry(name)).add(object.size, resident_bytes)
        total.add(object.size, resident_bytes)
    return list(entries.values()), total


def _show_under_stores(session: Session) -> None:
    found = sorted({(u.name, u.uri) for server in session.pool.status() for u in server.under_stores})
    session.output.document({"under_stores": [{"name": name, "uri": uri} for name, uri in found]})
    session.output.table(("under-store", "URI"), found)
