"""`torchcache index`."""

from __future__ import annotations

import time

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.output import duration_text, size_text

_FORMATS = ("tar", "parquet", "arrow", "tfrecord", "jsonl")


@click.command(epilog=EXIT_CODES, short_help="Find where the records of shards are, ahead of use.")
@click.argument("uris", nargs=-1, required=True)
@click.option(
    "--format", "name", type=click.Choice(_FORMATS), help="The shards' format, if their names don't say it."
)
@command
def index(session: Session, uris: tuple[str, ...], name: str | None) -> None:
    """Read the shards that URIS name, once, for how many records they hold and where these are.

    URIS are shards, folders or patterns, as CachedIterableDataset takes them. What is found is kept in the pool, for
    each version of a shard: a dataset that is made later begins at once. Shards that have an index are not read.
    """
    from torchcache.data.formats import format_of
    from torchcache.data.iterable_index import Indexing
    from torchcache.data.iterable_sources import common_folder, find_shards

    start_s = time.monotonic()
    shards = find_shards(session.pool, uris)
    total_bytes = sum(shard.size for shard in shards)
    folder = common_folder([session.pool.uri(shard.id) for shard in shards])
    format_ = format_of(name, (shard.id.key for shard in shards))
    with session.output.progress("indexing", items=len(shards), total_bytes=total_bytes) as advance:
        indices, made = Indexing(session.pool, format_, folder).run(shards, advance)
    took_s = time.monotonic() - start_s
    records = sum(one.count for one in indices)
    session.output.document(
        {
            "shards": len(shards),
            "format": format_.name,
            "records": records,
            "bytes": total_bytes,
            "indexed": made,
            "access": sorted({one.access for one in indices}),
            "seconds": round(took_s, 3),
        }
    )
    session.output.text(
        f"{len(shards):,} shards of {format_.name}, {size_text(total_bytes)}, {records:,} records: "
        f"{made:,} indexed in {duration_text(took_s)}, {len(shards) - made:,} had an index"
    )
