"""What CachedIterableDataset is told, checked, and what it finds out: which rank and worker it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import get_worker_info

from torchcache import environment
from torchcache.data.iterable_index import Access
from torchcache.data.iterable_order import Shuffle
from torchcache.errors import ConfigurationError


def this_worker() -> tuple[int, int]:
    """(workers, worker) of this process's loader; one if it has no workers."""
    info = get_worker_info()
    return (info.num_workers, info.id) if info is not None else (1, 0)


def shuffle_of(given: bool | str, access: Access) -> Shuffle:
    """The shuffle that `given` asks for, of records with such access. Raises ConfigurationError if there is none."""
    alone = access == "records"
    if given is False:
        return "none"
    if given is True:
        return "records" if alone else "blocks"
    if given == "records" and access == "stream":
        raise ConfigurationError(
            "shuffle='records' needs records that can be read alone, and these shards are compressed or streams: use "
            "shuffle='blocks'"
        )
    if given in ("records", "blocks"):
        return given  # type: ignore[return-value]
    raise ConfigurationError(f"shuffle={given!r}: it is True, False, 'records' or 'blocks'")


def this_rank() -> tuple[int, int]:
    """(ranks, rank) of torch.distributed, else of the environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return environment.world()


def replicas(ranks: int | None, rank: int | None) -> tuple[int, int] | None:
    """(ranks, rank) as they are given; None if they aren't. Raises ConfigurationError for one without the other."""
    if ranks is None and rank is None:
        return None
    if ranks is None or rank is None or not 0 <= rank < ranks:
        raise ConfigurationError(
            f"num_replicas={ranks}, rank={rank}: give both, with 0 <= rank < num_replicas"
        )
    return ranks, rank


def whole_number(value: int, name: str, least: int | None) -> int:
    """`value`, if it is a number from `least` on. Raises ConfigurationError."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigurationError(f"{name}={value!r}: it is a whole number{bound}")
    return value


def one_of(value: Any, name: str, known: tuple[str, ...]) -> Any:
    """`value`, if it is known. Raises ConfigurationError."""
    if value not in known:
        raise ConfigurationError(f"{name}={value!r}: it is one of {', '.join(map(repr, known))}")
    return value
