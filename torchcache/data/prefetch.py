"""Staging in the background, in the order a sampler will ask."""

from __future__ import annotations

import atexit
import copy
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from torchcache.data.samples import OnProgress
from torchcache.errors import ConfigurationError, TorchCacheError

_log = logging.getLogger("torchcache")

Stage = Callable[[Sequence[int], OnProgress, Callable[[], bool]], None]


class Prefetch:
    """Staging under way. Made by `CachedDataset.prefetch`; letting go of it doesn't stop it, `cancel` does."""

    def __init__(self, stage: Stage, indices: Sequence[int]) -> None:
        self.total = len(indices)
        """Samples to be staged."""
        self.staged = 0
        """Samples done so far: fetched, or found there."""
        self.staged_bytes = 0
        """Bytes of them, as far as known."""
        self._error: TorchCacheError | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(stage, indices), name="torchcache-prefetch", daemon=True
        )
        # The interpreter must not pull gRPC from under a call.
        atexit.register(self._leave)
        self._thread.start()

    def __repr__(self) -> str:
        state = "done" if self.done() else "cancelled" if self._cancelled.is_set() else "running"
        return f"Prefetch({self.staged} of {self.total} samples, {self.staged_bytes} bytes, {state})"

    def done(self) -> bool:
        """Whether nothing is under way any more: all staged, cancelled, or failed."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Stops after the calls under way. `wait` tells when."""
        self._cancelled.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until `done`, at most `timeout_s`; returns whether it is. Raises the error that staging met."""
        self._thread.join(timeout_s)
        if self.done() and self._error is not None:
            raise self._error
        return self.done()

    def _run(self, stage: Stage, indices: Sequence[int]) -> None:
        try:
            stage(indices, self._advance, self._cancelled.is_set)
        except TorchCacheError as error:
            self._error = error
            _log.warning("prefetch stopped after %d of %d samples: %s", self.staged, self.total, error)
        except Exception as error:  # noqa: BLE001 - of the user's dataset or encode=; kept for wait
            self._error = TorchCacheError(f"prefetch stopped: {type(error).__name__}: {error}")
            self._error.__cause__ = error
            _log.warning("%s", self._error, exc_info=error)
        finally:
            atexit.unregister(self._leave)

    def _advance(self, samples: int, size_bytes: int) -> None:
        self.staged += samples
        self.staged_bytes += size_bytes

    def _leave(self) -> None:
        self.cancel()
        self._thread.join(5.0)


def epoch_order(sampler: Iterable[Any], epoch: int, shared: Sequence[object]) -> list[int]:
    """The indices `sampler` gives in `epoch`, each once, in order of first use.

    The sampler is copied, but for the objects `shared` and the datasets it holds, and the global random generators
    are put back, so that what the sampler gives to training doesn't change. Raises ConfigurationError if it can't be
    copied.
    """
    memo = {id(value): value for value in (*shared, *_datasets(sampler))}
    try:
        copied = copy.deepcopy(sampler, memo)
    except Exception as error:
        raise ConfigurationError(f"prefetch can't copy the sampler {sampler!r}: {error}") from error
    for part in _nested(copied):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
    with _generators_put_back():
        return list(dict.fromkeys(_flat(copied)))


def _nested(sampler: Any) -> Iterator[Any]:
    """The sampler and those it wraps, as a batch sampler does."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def _datasets(sampler: Any) -> Iterator[object]:
    for part in _nested(sampler):
        yield from (getattr(part, name) for name in ("dataset", "data_source") if hasattr(part, name))


def _flat(sampler: Iterable[Any]) -> Iterator[int]:
    for item in sampler:
        if isinstance(item, list | tuple):
            yield from (int(i) for i in item)
        else:
            yield int(item)


@contextmanager
def _generators_put_back() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
