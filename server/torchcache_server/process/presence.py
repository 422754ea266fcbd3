"""An embedded server lives as long as some process uses its pool, and a little longer.

Every client process holds `clients.lock` in the pool's folder, shared, for its life; attaching happens under
`pool.lock`. The server looks, under `pool.lock` too, whether it can have `clients.lock` for itself: then nobody is
there. What the kernel says of locks needs no clock, no pid and no clean-up after SIGKILL.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from torchcache.locks import LockFile

POLL_S: Final = 2.0
_LOG = logging.getLogger(__name__)


def clients_present(root: Path) -> bool:
    """Whether any process uses the pool in `root`, or is just attaching to it."""
    with ExitStack() as stack:
        return not _alone(root, stack)


def wait_until_idle(
    root: Path,
    stopping: threading.Event,
    leave: Callable[[], None],
    *,
    idle_s: float,
    poll_s: float = POLL_S,
) -> bool:
    """Returns True once no process used the pool for `idle_s`, after calling `leave` under `pool.lock`: so whoever
    attaches next finds this server gone, not going. False as soon as `stopping` is set."""
    alone_since: float | None = None
    while not stopping.wait(poll_s):
        if not root.is_dir():
            _LOG.warning("the pool's folder %s is gone", root)
            return True
        with ExitStack() as stack:
            now = time.monotonic()
            if not _alone(root, stack):
                alone_since = None
            elif alone_since is None:
                alone_since = now
            elif now - alone_since >= idle_s:
                leave()
                return True
    return False


def _alone(root: Path, stack: ExitStack) -> bool:
    """True with both locks held on `stack`; False if someone else holds one."""
    try:
        for name in ("pool.lock", "clients.lock"):
            if not stack.enter_context(LockFile(root / name)).try_exclusive():
                return False
    except FileNotFoundError:  # the folder vanished
        return True
    return True
