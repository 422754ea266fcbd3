"""`torchcache stage`."""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

import click

from torchcache.cli.command import EXIT_CODES, Session, command, exit_code
from torchcache.cli.objects import folder_uri, objects_under
from torchcache.cli.output import duration_text, size_text
from torchcache.errors import TorchCacheError

SHOWN: Final = 20


@click.command(epilog=EXIT_CODES, short_help="Fetch objects into the pool ahead of use.")
@click.argument("uri")
@click.option(
    "--pattern", default="*", show_default=True, help="Only objects whose path below URI matches this."
)
@command
def stage(session: Session, uri: str, pattern: str) -> int:
    """Fetch all objects under URI into the pool, ahead of use.

    What the pool already holds is not fetched again, so an interrupted stage goes on where it stopped. What one object
    fails with doesn't stop the others. At the end all is there, or what isn't is listed, be it that it failed or had to
    go again: by how many objects, at which server and why, up to 20 by name (all of them with --json), and the exit
    code is that of the first failure.
    """
    start_s = time.monotonic()
    objects = objects_under(session.pool, uri, pattern=pattern)
    total_bytes = sum(o.size for o in objects)
    missing: dict[str, TorchCacheError] = {}
    before = session.pool.residency(objects)
    with session.output.progress("staging", items=len(objects), total_bytes=total_bytes) as advance:
        session.pool.stage(
            objects,
            namespace=folder_uri(session.pool, uri).rstrip("/"),
            on_progress=advance,
            on_missing=lambda info, error: missing.setdefault(session.pool.uri(info.id), error),
        )
    after = session.pool.residency(objects)
    if after.resident_bytes < total_bytes:
        from torchcache.pool.absent import absent  # what --help shouldn't wait for

        for info, error in absent(session.pool, objects):
            missing.setdefault(session.pool.uri(info.id), error)
    took_s = time.monotonic() - start_s
    session.output.document(
        {
            "uri": uri,
            "objects": len(objects),
            "bytes": total_bytes,
            "resident_bytes_before": before.resident_bytes,
            "resident_bytes": after.resident_bytes,
            "seconds": round(took_s, 3),
            "missing": [
                {"uri": name, "server": error.server, "why": error.message} for name, error in missing.items()
            ],
        }
    )
    fetched = max(0, after.resident_bytes - before.resident_bytes)
    count = f"{len(objects):,} object{'' if len(objects) == 1 else 's'}"
    session.output.text(
        f"{count}, {size_text(total_bytes)}: {size_text(fetched)} fetched in {duration_text(took_s)}, "
        f"{size_text(after.resident_bytes)} in the pool"
    )
    if missing:
        first = next(iter(missing.values()))
        if session.output.as_json:
            return exit_code(first)
        _say_missing(session, missing)
        raise first
    return 0


def _say_missing(session: Session, missing: dict[str, TorchCacheError]) -> None:
    reasons = Counter((error.server or "", error.message) for error in missing.values())
    if len(missing) > 1:
        for (server, why), count in reasons.most_common(SHOWN):
            session.output.warning(f"{count:,} missing{f' at {server}' if server else ''}: {why}")
    session.output.table(
        ("missing", "server"), [(n, e.server or "") for n, e in list(missing.items())[:SHOWN]]
    )
