"""Which epoch comes next, and from where: said in the main process, seen by workers, persistent ones too."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import get_worker_info

from torchcache.data.iterable_pass import Pass
from torchcache.data.iterable_recording import RecordingPass
from torchcache.data.iterable_state import Left
from torchcache.errors import ConfigurationError

_log = logging.getLogger("torchcache")

# Places in the memory that a dataset shares with its workers.
_EPOCH, _SAID, _LOADS, _USED_BY, _WORKING, _SHARED = range(6)

Loaded = Left | Pass | RecordingPass | None
"""What the next iteration goes on with."""


class Course:
    """What a dataset was told about its epochs. A copy that is pickled to a worker shares the numbers."""

    def __init__(self) -> None:
        self._shared = torch.zeros(_SHARED, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._loads = 0
        self.loaded: Loaded = None
        """The state that the next iteration goes on from, if one was loaded."""

    @property
    def epoch(self) -> int:
        """The epoch that was said last, or whose state was loaded since."""
        return int(self._shared[_EPOCH])

    @property
    def workers_know(self) -> bool:
        """Whether workers have begun to iterate, so that the main process doesn't know the position."""
        return bool(self._shared[_WORKING])

    def say(self, epoch: int) -> None:
        """The next iteration is of this epoch; a loaded state of another is let go."""
        self._shared[_EPOCH] = epoch
        self._shared[_SAID] = 1
        if isinstance(self.loaded, Left) and self.loaded.epoch != epoch:
            self.loaded = None

    def load(self, loaded: Left | Pass | RecordingPass, *, spent: bool) -> None:
        """The next iteration goes on from `loaded`; `spent` if nothing is left of it."""
        in_worker = get_worker_info() is not None
        if self._is_let_go(loaded, spent=spent, in_worker=in_worker):
            self.loaded = None
        else:
            self.loaded = loaded
            self._shared[_EPOCH] = _epoch_of(loaded)
        if not in_worker:
            self._shared[_USED_BY] = 0
            self._shared[_LOADS] += 1
            self._loads = int(self._shared[_LOADS])

    def _is_let_go(self, loaded: Left | Pass | RecordingPass, *, spent: bool, in_worker: bool) -> bool:
        """Whether another epoch has been said, behind a state that is loaded only now.

        A StatefulDataLoader hands on the state that it was given when it is iterated, and `set_epoch` has been called
        by then. In the main process that can't be told from a state that is loaded later than an epoch was said; there
        only one of which nothing is left is let go.
        """
        epoch, said = _epoch_of(loaded), self.epoch
        if not int(self._shared[_SAID]) or said == epoch or not (in_worker or spent):
            return False
        _log.info("a state of epoch %d is let go, since set_epoch(%d) was called", epoch, said)
        return True

    def taken(self) -> Loaded:
        """What was loaded, for the pass that begins; the next one begins anew."""
        loaded, self.loaded = self.loaded, None
        info = get_worker_info()
        if info is None:
            return loaded
        self._shared[_WORKING] = 1
        if isinstance(loaded, Left):
            # The main process, and so the workers of the next pass, can't see that these have used it up. Workers of
            # one pass have a seed in common.
            this_pass = (info.seed - info.id) % (1 << 62) + 1
            if not int(self._shared[_USED_BY]):
                self._shared[_USED_BY] = this_pass
            if int(self._shared[_USED_BY]) != this_pass:
                return None
        return loaded

    def check_seen(self) -> None:
        """Raises ConfigurationError in a worker that was started before the last state was loaded."""
        if self._loads != int(self._shared[_LOADS]):
            raise ConfigurationError(
                "a state was loaded into the dataset when persistent workers had it already: load it before the "
                "first iteration, or make a new DataLoader"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._shared.is_shared():  # type: ignore[no-untyped-call]  # a copy that is no worker's has workers of its own
            self._shared.share_memory_()  # type: ignore[no-untyped-call]


def _epoch_of(loaded: Left | Pass | RecordingPass) -> int:
    return loaded.epoch if isinstance(loaded, Left) else loaded.number
