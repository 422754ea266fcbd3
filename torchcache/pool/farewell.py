"""The last byte: a process that ends while saves of its embedded pool are still on their way waits for them.

An embedded pool lives only as long as somebody uses it. What is committed is safe in it, and the next start goes on
with the upload; but whoever looks into the under-store after the job ended wants to find the checkpoint there.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from torchcache.errors import TorchCacheError

if TYPE_CHECKING:
    from torchcache.pool.client import Pool

WAIT_S: Final = 120.0
POLL_S: Final = 0.2

Save = tuple[str, str, str, str]


class Farewell:
    """The saves this process committed, and their pools."""

    def __init__(self) -> None:
        self._saves: dict[Save, Pool] = {}
        self._pid = 0

    def expect(self, pool: Pool, store: str, path: str, part: str, save_id: str) -> None:
        """Remembers a save that is not durable yet."""
        if self._pid != os.getpid():  # a forked child does not wait for its parent's saves
            self._saves, self._pid = {}, os.getpid()
            atexit.register(self.wait)
        self._saves[store, path, part, save_id] = pool

    def forget(self, address: str) -> None:
        """Expects nothing more of the pool at `address`: it was closed, and its servers drained."""
        for save, pool in list(self._saves.items()):
            if pool.address == address:
                self._saves.pop(save, None)

    def wait(self, wait_s: float = WAIT_S) -> None:
        """Waits until the saves are durable or failed, for at most `wait_s`; Ctrl-C ends it."""
        if self._pid != os.getpid():
            return
        deadline = time.monotonic() + wait_s
        told = False
        try:
            while (left := self._pending()) and time.monotonic() < deadline:
                if not told:
                    told = True
                    print(
                        f"torchcache: waiting for {left} save{'s' if left > 1 else ''} to reach the under-store "
                        "(Ctrl-C leaves; the next start goes on)",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            pass
        self._saves.clear()

    def _pending(self) -> int:
        for save, pool in list(self._saves.items()):
            store, path, part, save_id = save
            try:
                info = pool.get_save(store, path, part, manifest=False)
                done = info.save_id != save_id or info.state in ("durable", "failed")
            except TorchCacheError:
                done = True
            if done:
                self._saves.pop(save, None)
        return len(self._saves)


farewell: Final = Farewell()
