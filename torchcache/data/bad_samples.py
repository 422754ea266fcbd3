"""Samples that can't be had: raised, or left out, which is logged with their names and counted over all workers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch.utils.data import get_worker_info

from torchcache.data.iterable_settings import one_of
from torchcache.data.naming import say_which
from torchcache.data.process_errors import is_of_one_sample

if TYPE_CHECKING:
    from torchcache.data.samples import Samples

_log = logging.getLogger("torchcache")

OnError = Literal["raise", "skip"]

Transform = Callable[[Any], Any]

_PLACES: Final = 128


class Skips:
    """How many samples were left out, by this process and its workers: a number for each, in memory that they share.

    A copy that is pickled to a worker shares it; any other has numbers of its own.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_PLACES, dtype=torch.int64)
        self._counts.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def total(self) -> int:
        """Of all."""
        return int(self._counts.sum())

    def add(self) -> None:
        """One more, here."""
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (_PLACES - 1)] += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._counts.is_shared():  # type: ignore[no-untyped-call]
            self._counts.share_memory_()  # type: ignore[no-untyped-call]


def skips_under(on_error: OnError) -> Skips | None:
    """What counts them; None where none is left out. Raises ConfigurationError for what `on_error=` can't be."""
    return Skips() if one_of(on_error, "on_error", ("raise", "skip")) == "skip" else None


class Sieve:
    """What becomes of samples that can't be had: raised, or counted, logged and left out."""

    def __init__(self, on_error: OnError, skips: Skips, name: Callable[[int], str]) -> None:
        """`name` is what a sample is called, by its number."""
        self._on_error = on_error
        self._skips = skips
        self._name = name

    def passed(self, number: int, outcome: Any, transform: Transform | None) -> tuple[Any, ...]:
        """Sample `number`, transformed, as a tuple of one; none if it is left out. Raises what isn't to be skipped.

        `outcome` is the sample, or the error that it ended with.
        """
        handled = sys.exception()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            return (outcome if transform is None else transform(outcome),)
        except Exception as error:
            if not self.leaves_out(number, error, handled):
                raise
            return ()

    def leaves_out(self, number: int, error: Exception, handled: BaseException | None) -> bool:
        """Whether sample `number` is left out for this error; then it is counted and logged, else it says which it is.

        `handled` is what was being handled already when the sample was asked for.
        """
        if self._on_error == "raise" or not is_of_one_sample(error, handled):
            say_which(error, lambda: self._name(number))
            return False
        self._skips.add()
        # As text: who keeps records of the log keeps no traceback, and no buffers with it.
        _log.warning("%s is skipped: %s: %s", self._name(number), type(error).__name__, str(error))
        return True


class EmptyBatch(list[Any]):
    """A batch of which no sample is left. To take one from it raises what the last ended with: torch's
    `default_collate` does, while a `collate_fn` that looks whether there are any may go on.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def __getitem__(self, index: Any) -> Any:
        raise self._error

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, ())


def those_readable(
    samples: Samples, indices: Sequence[int], transform: Transform | None, skips: Skips
) -> list[Any]:
    """The samples of `indices` that can be had, in order. Raises what isn't the matter of one sample."""
    sieve = Sieve("skip", skips, samples.name)
    kept: list[Any] = []
    last: Exception | None = None
    handled = sys.exception()
    for index, outcome in zip(indices, _outcomes(samples, indices, handled), strict=True):
        try:
            if isinstance(outcome, Exception):
                raise outcome
            kept.append(outcome if transform is None else transform(outcome))
            last = None
        except Exception as error:
            if not sieve.leaves_out(index, error, handled):
                raise
            # Its traceback refers to this frame, which must not keep the others' buffers until the next collection.
            del outcome
            last = None if kept else error
    return kept if last is None else EmptyBatch(last)


def _outcomes(samples: Samples, indices: Sequence[int], handled: BaseException | None) -> Iterator[Any]:
    """Of each its sample, or its error: by one request, and where that fails by one for each."""
    try:
        together = samples.read(indices)
    except Exception as error:
        if not is_of_one_sample(error, handled):
            raise
    else:
        yield from together
        return
    for index in indices:
        try:
            outcome = samples.read([index])[0]
        except Exception as error:  # noqa: BLE001 - what is no sample's matter is raised by who takes it
            outcome = error
        yield outcome
