"""Waiting until a save is in the under-store. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchcache.errors import CheckpointError, DeadlineExceeded
from torchcache.model import ObjectId

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

_POLL_S = 0.05
_MOST_POLL_S = 1.0
STALL_S = 600.0


def wait_until_durable(
    pool: Pool,
    save: SaveInfo,
    *,
    timeout_s: float | None = None,
    on_progress: Callable[[int], None] = lambda pending_bytes: None,
) -> None:
    """Until `save` is in the under-store; gives up when nothing moved for ten minutes, or after `timeout_s`.

    `on_progress` gets the bytes that are still to be uploaded, each time it looks. Raises CheckpointError if the upload
    failed or another save took the path, DeadlineExceeded.
    """
    uri = pool.uri(ObjectId(save.store, save.path, ""))
    start_s = moved_s = time.monotonic()
    pause_s, pending = _POLL_S, -1
    while True:
        info = pool.get_save(save.store, save.path, save.part, manifest=False)
        if info.save_id != save.save_id:
            raise CheckpointError(f"another save replaced {uri} while it was uploaded", object=uri)
        on_progress(info.pending_bytes)
        if info.state == "durable":
            return
        if info.state == "failed":
            raise CheckpointError(
                f"{uri} was saved to the pool, but its upload failed: {info.error}; it loads from the pool, and save "
                "it again once the cause is mended",
                object=uri,
            ) from info.error
        now_s = time.monotonic()
        if info.pending_bytes != pending:
            pending, moved_s = info.pending_bytes, now_s
        if now_s - moved_s > STALL_S or (timeout_s is not None and now_s - start_s >= timeout_s):
            raise DeadlineExceeded(
                f"{uri} is saved in the pool, and {pending} bytes of it still wait for their upload after "
                f"{now_s - start_s:.0f} s; the pool goes on trying",
                object=uri,
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _MOST_POLL_S)
