"""Staging in the background, in the order a sampler will ask."""

from __future__ import annotations

import atexit
import copy
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchcache.data.samples import OnMissing, OnProgress
from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.model import ObjectInfo

_log = logging.getLogger("torchcache")

Stage = Callable[[Sequence[int], OnProgress, Callable[[], bool], OnMissing], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Chunks that aren't in the pool, the server that should hold them, and why it doesn't."""

    server: str
    chunks: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchProgress:
    """How far a prefetch is, with one epoch.

    `staged` of its `samples` are there, or were read already; `ahead_bytes` were fetched and not yet read. `position`
    counts the samples that were read, as far as servers know; -1 before the epoch begins, or where nobody knows.
    `eta_s` is until all of the epoch is staged, at its pace so far; None if that can't be told yet.
    """

    epoch: int
    samples: int
    staged: int
    staged_bytes: int
    ahead_bytes: int
    position: int
    eta_s: float | None = None
    missing: tuple[Missing, ...] = ()


class Prefetch(ABC):
    """Staging under way. Made by `CachedDataset.prefetch`; letting go of it doesn't stop it, `cancel` does."""

    def __repr__(self) -> str:
        state = "done" if self.done() else "running"
        return f"Prefetch({self.staged} of {self.total} samples, {self.staged_bytes} bytes, {state})"

    @property
    @abstractmethod
    def total(self) -> int:
        """Samples to be staged."""

    @property
    @abstractmethod
    def staged(self) -> int:
        """Samples done so far: fetched, found there, or read already."""

    @property
    @abstractmethod
    def staged_bytes(self) -> int:
        """Bytes of them, as far as known."""

    @abstractmethod
    def done(self) -> bool:
        """Whether nothing is under way any more: all staged, cancelled, or failed."""

    @abstractmethod
    def cancel(self) -> None:
        """Stops after what is under way."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until `done`, at most `timeout_s`; returns whether it is. Raises the error that staging met.

        Returns too, False, when the pool is as far ahead as it has room for: it goes on as training reads.
        """

    @abstractmethod
    def progress(self) -> PrefetchProgress:
        """How far it is, what is missing, and why."""


class ComputedPrefetch(Prefetch):
    """Of computed samples: they are computed here, in a thread."""

    total = 0
    staged = 0
    staged_bytes = 0

    def __init__(self, stage: Stage, indices: Sequence[int], epoch: int = 0) -> None:
        self.total = len(indices)
        self._epoch = epoch
        self._began_s = time.monotonic()
        self._error: TorchCacheError | None = None
        self._lacking = 0
        self._why_lacking = ""
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
        return not self._thread.is_alive()

    def cancel(self) -> None:
        self._cancelled.set()

    def progress(self) -> PrefetchProgress:
        left = self.total - self.staged - self._lacking
        took_s = time.monotonic() - self._began_s
        why = str(self._error) if self._error else "on its way"
        return PrefetchProgress(
            epoch=self._epoch,
            samples=self.total,
            staged=self.staged,
            staged_bytes=self.staged_bytes,
            ahead_bytes=0,
            position=-1,
            eta_s=left * took_s / self.staged if self.staged else None,
            missing=tuple(
                Missing(server="this process", chunks=count, why=text)
                for count, text in ((left, why), (self._lacking, self._why_lacking))
                if count
            ),
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        self._thread.join(timeout_s)
        if self.done() and self._error is not None:
            raise self._error
        return self.done()

    def _run(self, stage: Stage, indices: Sequence[int]) -> None:
        try:
            stage(indices, self._advance, self._cancelled.is_set, self._miss)
        except TorchCacheError as error:
            self._error = error
            _log.warning("prefetch stopped after %d of %d samples: %s", self.staged, self.total, error)
        except Exception as error:  # noqa: BLE001 - of the user's dataset or encode=; kept for wait
            self._error = TorchCacheError(f"prefetch stopped: {type(error).__name__}: {error}")
            self._error.__cause__ = error
            _log.warning("%s", self._error, exc_info=error)
        finally:
            atexit.unregister(self._leave)

    def _miss(self, _: ObjectInfo, error: TorchCacheError) -> None:
        self._lacking += 1
        self._why_lacking = self._why_lacking or str(error)

    def _advance(self, samples: int, size_bytes: int) -> None:
        self.staged += samples
        self.staged_bytes += size_bytes

    def _leave(self) -> None:
        self.cancel()
        self._thread.join(5.0)


class Orders:
    """The orders that a sampler will give, asked of a copy, so that what it gives to training doesn't change."""

    def __init__(self, sampler: Iterable[Any], shared: Sequence[object]) -> None:
        """The objects `shared`, and the datasets the sampler holds, aren't copied.

        Raises ConfigurationError if the sampler can't be.
        """
        memo = {id(value): value for value in (*shared, *_datasets(sampler))}
        try:
            self._sampler = copy.deepcopy(sampler, memo)
        except Exception as error:
            raise ConfigurationError(f"prefetch can't copy the sampler {sampler!r}: {error}") from error
        self._settable = [
            part for part in _nested(self._sampler) if callable(getattr(part, "set_epoch", None))
        ]
        epochs = [part.epoch for part in self._settable if isinstance(getattr(part, "epoch", None), int)]
        self.epoch: int | None = epochs[0] if epochs else None
        """That the sampler was set to."""

    @property
    def by_epoch(self) -> bool:
        """Whether an order is a function of the epoch."""
        return bool(self._settable)

    def of(self, epoch: int) -> list[int]:
        """The indices read in `epoch`, in order."""
        for part in self._settable:
            part.set_epoch(epoch)
            if epoch != self.epoch and getattr(part, "next_yielded", None) is not None:
                part.next_yielded = None  # a state that was loaded is of the sampler's own epoch
        return list(_flat(self._sampler))

    def once(self, epoch: int) -> list[int]:
        """The same, the global random generators being put back: for the thread that uses them."""
        with _generators_put_back():
            return self.of(epoch)


def epoch_order(sampler: Iterable[Any], epoch: int, shared: Sequence[object]) -> list[int]:
    """The indices `sampler` gives in `epoch`, each once, in order of first use. Raises ConfigurationError."""
    return list(dict.fromkeys(Orders(sampler, shared).once(epoch)))


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
