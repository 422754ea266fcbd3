"""Where a sampler is: how its place gets into a StatefulDataLoader's state, and out of it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torchcache.errors import ConfigurationError


class Resumable(Protocol):
    """A sampler that goes on from states."""

    yielded: int

    next_yielded: int | None
    """Of the state loaded last, unless it is used up."""

    def begin(self) -> Iterator[int]:
        """The samples from where the state loaded last says; it is used up by that."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...


class Giving(Iterator[int]):
    """One pass over a sampler, which begins when it is first asked, or is given a state.

    Loaders make passes that they never ask. So one of them must not use up a state that the sampler was given; but the
    one that the loader gave its own state must: at the end of an epoch the loader drops it, and the next begins anew.
    """

    def __init__(self, sampler: Resumable) -> None:
        self._sampler = sampler
        self._rest: Iterator[int] | None = None

    def __next__(self) -> int:
        if self._rest is None:
            self._rest = self._sampler.begin()
        index = next(self._rest)
        self._sampler.yielded += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is; the sampler itself speaks of the one before until this one begins."""
        state = self._sampler.state_dict()
        is_new = self._rest is None and self._sampler.next_yielded is None
        return {**state, "yielded": 0, "start": 0} if is_new else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Begins there."""
        self._sampler.load_state_dict(state_dict)
        self._rest = self._sampler.begin()


def sampler_state_of(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The sampler's state in a StatefulDataLoader's, None if its epoch was over; a state of a sampler's as it is.

    Raises ConfigurationError if there is none.
    """
    if "_iterator_finished" not in state:
        return state
    if state["_iterator_finished"]:
        return None
    if state.get("_steps_since_snapshot"):
        raise ConfigurationError(
            "the loader's state is older than its position: make the StatefulDataLoader with snapshot_every_n_steps=1 "
            "and in_order=True"
        )
    main = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
    batches = main.get("_sampler_iter_state") or {}
    states = (
        batches,
        batches.get("sampler_iter_state"),
        batches.get("sampler_state"),
        main.get("_index_sampler_state"),
    )
    found = next(
        (one for one in states if isinstance(one, Mapping) and "yielded" in one and "generator" not in one),
        None,
    )
    if found is None:
        raise ConfigurationError(
            "this is the state of a loader whose sampler has none: use tc.LocalitySampler, or torchdata's "
            "StatefulDistributedSampler"
        )
    return found
