"""The embedded pool: servers on this machine, started when first needed, shared by all processes of the user."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torchcache.pool.client import Pool


class LocalPool:
    """An embedded pool as a context manager; entering gives its `Pool`.

    `root` is the folder that keeps its contents (default: under `TORCHCACHE_HOME`, or the user's cache folder).
    `capacity` is in bytes, or text like "100GB" (default: a tenth of the free disk), over all `servers`. Leaving stops
    the servers unless other processes use them; the contents stay.
    """

    def __init__(
        self, root: Path | str | None = None, capacity: int | str | None = None, servers: int = 1
    ) -> None:
        raise NotImplementedError

    @property
    def pool(self) -> Pool:
        """The pool; its servers start at first use."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """`host:port,...` of the running servers; starts them."""
        raise NotImplementedError

    def __enter__(self) -> Pool:
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the servers unless another process uses them; the contents stay."""
        raise NotImplementedError
