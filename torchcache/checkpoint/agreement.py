"""Ranks that agree: one decides, all go by what it decided, or all raise what it met."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchcache.errors import CheckpointError, TorchCacheError

_T = TypeVar("_T")

# A single process is nothing to warn of at every save. (Filters can't be changed for one thread alone.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Ranks:
    """The processes of a job, or just this one. Made by all of them at the same place in their code."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self.size = 1
        self.rank = 0
        if dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
            if self.size > 1:
                # Of its own, so that what a thread does with it never meets the trainer's collectives; and on the CPU.
                self._group = dist.new_group(backend="gloo")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What to give torch as process_group; None of a single process."""
        return self._group

    @property
    def decides(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def decide(self, decision: Callable[[], _T]) -> _T:
        """What rank 0 finds by calling `decision`, on all ranks. Raises its error on all of them."""
        if self._group is None:
            return decision()
        outcome: list[Any] = [None, None]
        if self.decides:
            try:
                outcome[0] = decision()
            except Exception as error:  # noqa: BLE001 - all ranks raise it; one that kept it to itself would leave them waiting
                outcome[1] = as_ours(error)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def all_or_none(self, action: Callable[[], None]) -> None:
        """Calls `action` on every rank. Raises on all of them if it failed on any: the error of the lowest."""
        error: Exception | None = None
        try:
            action()
        except Exception as raised:  # noqa: BLE001 - told to all ranks, and raised by all
            error = as_ours(raised)
        if self._group is None:
            if error is not None:
                raise error
            return
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error, group=self._group)
        for rank, found in enumerate(errors):
            if found is not None:
                raise found if rank == self.rank else CheckpointError(f"rank {rank}: {found}") from found

    def close(self) -> None:
        """Gives the group back; all ranks call it."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


def as_ours(error: BaseException) -> TorchCacheError:
    """An error that pickles: ours as it is, any other as a CheckpointError that names it."""
    if isinstance(error, TorchCacheError):
        return error
    return CheckpointError(f"{type(error).__name__}: {error}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """What torch gathered of all ranks as the error of the lowest one."""
    try:
        yield
    except CheckpointException as gathered:
        rank, (cause, _) = min(gathered.failures.items(), key=lambda failure: failure[0])
        error = as_ours(cause)
        raise error.saying(
            f"rank {rank}: {error.message}" if len(gathered.failures) > 1 or rank else error.message
        ) from cause
