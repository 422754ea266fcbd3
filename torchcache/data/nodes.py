"""A dataset as the source of a graph of torchdata.nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torchdata.nodes import BaseNode

if TYPE_CHECKING:
    from torchcache.data.iterable import CachedIterableDataset

_EPOCH, _BEGUN, _DATASET = "epoch", "begun", "dataset"


class SourceNode(BaseNode[Any]):  # type: ignore[misc]
    """The samples of a CachedIterableDataset, for Batcher, ParallelMapper, Prefetcher and the other nodes.

    Each iteration of the loader is an epoch: the first is `epoch`, and the node calls `set_epoch` itself. A loader's
    state goes on exactly, with any number of ranks: ranks are taken to be in step, so one rank's state is enough.
    """

    def __init__(self, dataset: CachedIterableDataset, *, epoch: int = 0) -> None:
        """`dataset` is this node's own from here on: it has one position."""
        super().__init__()
        self._dataset = dataset
        self._epoch = epoch
        self._begun = False
        self._samples: Iterator[Any] = iter(())

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begins the next epoch, or goes on from a state. Raises ConfigurationError for one of other samples."""
        super().reset(initial_state)
        if initial_state is not None:
            self._epoch, self._begun = initial_state[_EPOCH], initial_state[_BEGUN]
            self._dataset.set_epoch(self._epoch)
            self._dataset.load_state_dict(initial_state[_DATASET])
        else:
            self._epoch += self._begun
            self._begun = False
            self._dataset.set_epoch(self._epoch)
        self._samples = iter(self._dataset)

    def next(self) -> Any:
        self._begun = True
        return next(self._samples)

    def get_state(self) -> dict[str, Any]:
        return {_EPOCH: self._epoch, _BEGUN: self._begun, _DATASET: self._dataset.state_dict()}
