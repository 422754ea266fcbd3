"""What a user wants of a dataset's place in the store."""

from __future__ import annotations

from dataclasses import dataclass

from torchcache.errors import ConfigurationError

MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a namespace is treated when room is short. Raises ConfigurationError for what makes no sense.

    `pinned`: never evicted. `priority`, -1000 to 1000: who has a lower one yields first, and never takes room from who
    has a higher one. `quota_bytes`: it takes no more room than that; what is fetched beyond passes through. `ttl_s`:
    dropped once nobody used it for so long, counted by the running server.
    """

    pinned: bool = False
    priority: int = 0
    quota_bytes: int | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ConfigurationError(
                f"a priority of {self.priority}: give one from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            )
        if self.quota_bytes is not None and self.quota_bytes <= 0:
            raise ConfigurationError(f"a quota of {self.quota_bytes} bytes: give a positive one, or none")
        if self.ttl_s is not None and not self.ttl_s > 0:
            raise ConfigurationError(f"a time to live of {self.ttl_s} s: give a positive one, or none")
