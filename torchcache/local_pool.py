"""The embedded pool as users meet it: servers on this machine, shared by all processes of the user."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import TracebackType

from torchcache import environment
from torchcache.embedded import ATTACH_S, EmbeddedMembers, release
from torchcache.errors import ConfigurationError
from torchcache.pool.client import Pool
from torchcache.pool.farewell import farewell
from torchcache.pool.lane_choice import LaneName, lane_name
from torchcache.sizes import parse_size


def default_root() -> Path:
    """The folder of the embedded pool of this user, on this machine, for the S3 that the environment names.

    Pools of different endpoints, profiles and regions are kept apart.
    """
    settings = json.dumps(environment.endpoint_settings(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return environment.home().expanduser().absolute() / "pools" / digest


def wanted_lane(lane: str | None) -> LaneName:
    """The lane that is asked for, by the caller or by `TORCHCACHE_LANE`. Raises ConfigurationError."""
    return lane_name(lane or environment.lane() or "auto")


class LocalPool:
    """An embedded pool as a context manager; entering gives its `Pool`.

    `root` is the folder that keeps its contents (default: under `TORCHCACHE_HOME`, or the user's cache folder).
    `capacity` is in bytes, or text like "100GB" (default: a tenth of the free disk), over all `servers`. `lane` as
    `connect` has it. Leaving stops the servers unless other processes use them; the contents stay.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        capacity: int | str | None = None,
        servers: int = 1,
        *,
        lane: str | None = None,
    ) -> None:
        if isinstance(servers, bool) or not isinstance(servers, int) or not 1 <= servers <= 64:
            raise ConfigurationError(f"servers={servers!r}: a local pool has 1 to 64 servers")
        self._source = EmbeddedMembers(
            root=Path(root).expanduser().absolute() if root is not None else default_root(),
            servers=servers,
            capacity_bytes=parse_size(capacity) if capacity is not None else None,
        )
        self._pool = Pool(self._source, wanted_lane(lane))

    def __repr__(self) -> str:
        return f"LocalPool({str(self._source.root)!r})"

    @property
    def pool(self) -> Pool:
        """The pool; its servers start at first use."""
        return self._pool

    @property
    def address(self) -> str:
        """`host:port,...` of the running servers; starts them."""
        endpoints = self._source.resolve(deadline=time.monotonic() + ATTACH_S)
        return ",".join(endpoint.address for endpoint in endpoints)

    def __enter__(self) -> Pool:
        self._source.resolve(deadline=time.monotonic() + ATTACH_S)
        return self._pool

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the servers this process started, unless another process uses them; the contents stay.

        They first upload what is not yet in the under-store, for up to 40 seconds; what is left then, the next start
        goes on with.
        """
        self._pool.close()
        farewell.forget(self._pool.address)
        release(self._source.root)
