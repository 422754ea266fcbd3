"""What a stage brought and the pool no longer holds: it had to go again for what came after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchcache.errors import OutOfSpace
from torchcache.model import Extent, ObjectInfo
from torchcache.pool.client import Pool
from torchcache.pool.routing import main_owner


def absent(pool: Pool, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, OutOfSpace]]:
    """Those of `objects` that the pool doesn't wholly hold now, with an error that names the server they belong to."""
    servers = pool.servers()
    placement = pool.placement(servers)
    for info, held in zip(objects, pool.resident_bytes(objects), strict=True):
        if held < info.size:
            why = (
                f"{info.size - held:,} of its {info.size:,} bytes had to go again: there is no room for all, the "
                "servers need more --capacity"
            )
            server = servers[main_owner(Extent(info), placement)]
            yield info, OutOfSpace(why, object=pool.uri(info.id), server=server)
