"""Recording an IterableDataset: the first full pass goes into the pool, later ones are read from there.

A dataset like that knows no indices, and splits itself over ranks and workers as it likes. So each reader records its
own *part*: its samples in the order in which it got them, and behind them an end mark, once its iteration has come to
its end. When all readers of one epoch have left their marks the recording is *whole*, and a list of the parts says so.
What was cut short has no mark, and counts for nothing.

What lies in the pool is never overwritten, and may be evicted. A recording that was partly evicted is made anew as the
next *generation*; which one that is, is found out once, when the dataset is made.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import xxhash

from torchcache.data import codec
from torchcache.data.fingerprint import fingerprint
from torchcache.data.iterable_index import Access
from torchcache.data.iterable_order import Ints
from torchcache.data.iterable_pass import STATE
from torchcache.data.iterable_position import Split
from torchcache.data.naming import named, say_which
from torchcache.data.samples import residency_of
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotResident,
    ObjectNotFound,
    OutOfSpace,
    TorchCacheError,
    TransientError,
)
from torchcache.model import SAMPLES, SAVE_PREFIX, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool, Residency

_log = logging.getLogger("torchcache")

_AT_ONCE: Final = 64
_AT_ONCE_BYTES: Final = 16 * 1024 * 1024
"""Samples held until they are written."""

WAIT_S: Final = 30.0
"""How long a reader that is through with its part waits for those that are about to be."""

_POLL_S: Final = 0.1


class Recording:
    """The place of a dataset's recording in the pool. Pickles."""

    def __init__(self, pool: Pool, dataset: Any, name: str | None, version: str | int | None) -> None:
        """Raises ConfigurationError if a name is needed, or can't be one."""
        self.pool = pool
        self.name = name or f"{type(dataset).__name__}-{fingerprint(dataset)}"
        self.version = "0" if version is None else str(version)
        if not self.version or self.version.startswith(SAVE_PREFIX):
            raise ConfigurationError(
                f"version={version!r}: it must not be empty, or start with {SAVE_PREFIX!r}"
            )
        self.namespace = f"{SAMPLES}:{self.name}@{self.version}"
        self._generation = 0

    def open(self) -> Recorded | None:
        """The recording, if there is a whole one, and all of it is still in the pool."""
        while (found := self.found()) is not None:
            if found.residency().resident_objects == found.count:
                return found
            _log.warning("%s: some of what was recorded was evicted; it is recorded again", self.namespace)
            self._generation += 1
        return None

    def found(self) -> Recorded | None:
        """The recording, once it is whole."""
        value = self._get("whole")
        if value is None:
            return None
        try:
            parts = [(str(prefix), int(count)) for prefix, count in value["parts"]]
        except (TypeError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"the list of the parts of {self.namespace} is malformed: {error}"
            ) from error
        return Recorded(self, parts)

    def soon_found(self, parts: Sequence[Part]) -> Recorded | None:
        """The recording if it is whole, or is about to be: who has recorded one of `parts` waits for the others."""
        found = self.found()
        mine = [] if found is not None else [part for part in parts if part.mark() is not None]
        end = time.monotonic() + WAIT_S
        while mine and found is None and time.monotonic() < end:
            time.sleep(_POLL_S)
            for part in mine:
                part.complete()
            found = self.found()
        if mine and found is None:
            _log.warning(
                "%s: not all readers have recorded their parts; this pass is no replay", self.namespace
            )
        return found

    def object(self, key: str) -> ObjectInfo:
        place = f"{self.name}/recorded/{self._generation}/{key}"
        return ObjectInfo(ObjectId(SAMPLES, place, self.version), UNKNOWN_SIZE)

    def get_each(self, keys: Sequence[str]) -> list[Any]:
        """What lies under each key, None if nothing does. Raises TransientError and IntegrityError."""
        extents = [Extent(self.object(key)) for key in keys]
        values: list[Any] = []
        for outcome in self.pool.read_each(extents, namespace=self.namespace, resident_only=True):
            if isinstance(outcome, TorchCacheError) and not isinstance(outcome, ObjectNotFound):
                raise outcome
            values.append(None if isinstance(outcome, TorchCacheError) else codec.decode(outcome))
        return values

    def _get(self, key: str) -> Any:
        return self.get_each([key])[0]

    def put(self, records: Sequence[tuple[str, memoryview]]) -> None:
        self.pool.write(self.namespace, [(self.object(key).id, [record]) for key, record in records])


class Part:
    """What one reader records in one epoch."""

    def __init__(self, recording: Recording, split: Split, rank: int, worker: int, epoch: int) -> None:
        self._recording = recording
        self._pass = f"{split.ranks}x{split.workers}/{epoch}"
        self._readers = [f"{r}.{w}" for r in range(split.ranks) for w in range(split.workers)]
        self._reader = f"{rank}.{worker}"
        alone = "" if len(self._readers) == 1 else f", as rank {rank} and worker {worker} count"
        self._named = f"of {recording.namespace}{alone}"

    def name(self, number: int) -> str:
        """What this reader's sample `number` is called in errors and logs."""
        return f"sample {number} {self._named}"

    def mark(self) -> Any:
        """The end mark, None if there is none yet."""
        return self._recording.get_each([f"{self._pass}/{self._reader}/end"])[0]

    def recorded(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Each of `samples` as it is read again later, recorded by the time that the last one has been handed out.

        Training doesn't fail because the pool can't take a sample: then nothing is recorded, and that is logged.
        """
        prefix = f"{self._pass}/{self._reader}/{uuid.uuid4().hex}"
        keeps, held, size, count = self.mark() is None, [], 0, 0
        for sample in samples:
            record = self._encoded(sample, count)
            held.append((f"{prefix}/{count}", record))
            size, count = size + len(record), count + 1
            if len(held) >= _AT_ONCE or size >= _AT_ONCE_BYTES:
                keeps = keeps and self._kept(held)
                held, size = [], 0
            yield codec.decode(memoryview(bytes(record)))
        end = codec.encode({"prefix": prefix, "count": count})
        if keeps and self._kept([*held, (f"{self._pass}/{self._reader}/end", end)]):
            self.complete()

    def _encoded(self, sample: Any, number: int) -> memoryview:
        try:
            return codec.encode(sample)
        except Exception as error:
            say_which(error, lambda: self.name(number))
            raise

    def _kept(self, records: Sequence[tuple[str, memoryview]]) -> bool:
        try:
            self._recording.put(records)
        except (OutOfSpace, TransientError, IntegrityError) as error:
            _log.warning("%s is not recorded in this pass: %s", self._recording.namespace, error)
            return False
        return True

    def complete(self) -> None:
        """Declares the recording whole, if all readers of the pass have left their marks."""
        marks = self._recording.get_each([f"{self._pass}/{reader}/end" for reader in self._readers])
        if all(mark is not None for mark in marks):
            parts = [[mark["prefix"], mark["count"]] for mark in marks]
            self._kept([("whole", codec.encode({"parts": parts}))])


class Recorded:
    """A whole recording: samples that are read alone, in any order. Pickles."""

    access: Access = "records"

    def __init__(self, recording: Recording, parts: Sequence[tuple[str, int]]) -> None:
        self._recording = recording
        self._parts = parts
        self.blocks: Ints = np.array([count for _, count in parts], dtype=np.int64)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.blocks)])
        self.count = int(self._firsts[-1])
        self.digest = str(xxhash.xxh3_128_hexdigest(repr((recording.namespace, parts)).encode()))

    def describe(self) -> str:
        return f"recorded as {self._recording.namespace}, {self.count:,} samples"

    def name(self, number: int) -> str:
        return f"sample {number} of {self._recording.namespace}"

    def object(self, number: int) -> ObjectInfo:
        part = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._recording.object(f"{self._parts[part][0]}/{number - int(self._firsts[part])}")

    def residency(self) -> Residency:
        return residency_of(self._recording.pool, self.object, self.count)

    def reading(self) -> RecordedReading:
        return RecordedReading(self, self._recording)


class RecordedReading:
    """One pass's way to recorded samples."""

    at_once = _AT_ONCE

    def __init__(self, recorded: Recorded, recording: Recording) -> None:
        self._recorded = recorded
        self._recording = recording

    def cut(self, ids: Ints) -> int:
        return len(ids)

    def fetch(self, ids: Ints) -> list[Any]:
        extents = [Extent(self._recorded.object(number)) for number in ids.tolist()]
        pool, namespace = self._recording.pool, self._recording.namespace
        found = pool.read_each(extents, namespace=namespace, resident_only=True)
        return [self._sample(outcome) for outcome in found]

    def _sample(self, outcome: memoryview | TorchCacheError) -> Any:
        if isinstance(outcome, NotResident):
            raise NotResident(
                f"a recorded sample of {self._recording.namespace} is no longer in the pool: make the dataset again, "
                "to record it again; give the pool more room, or pin it (torchcache pin)",
                object=outcome.object,
                server=outcome.server,
            )
        if isinstance(outcome, IntegrityError):
            return outcome
        if isinstance(outcome, TorchCacheError):
            raise outcome
        try:
            return codec.decode(outcome)
        except IntegrityError as error:
            return error


@dataclass(slots=True)
class RecordingPass:
    """A reader's way through the wrapped dataset, before there is a recording: epoch, split, worker, samples had."""

    number: int
    split: Split
    worker: int
    count: int = 0

    def state(self) -> dict[str, Any]:
        """Plain values, new ones at each call."""
        split = [self.split.ranks, self.split.workers, self.split.run, int(self.split.contiguous)]
        return {
            "torchcache": STATE,
            "recording": True,
            "epoch": self.number,
            "split": split,
            "worker": self.worker,
            "count": self.count,
        }


class Recorder:
    """A dataset, and where it is recorded."""

    def __init__(self, recording: Recording, dataset: Any) -> None:
        self.recording = recording
        self._dataset = dataset

    def __str__(self) -> str:
        return self.recording.namespace

    def soon_recorded(self, split: Split, rank: int, worker: int, epoch: int) -> Recorded | None:
        """The recording, at the begin of `epoch`: readers all have to see it, or none. See `Recording.soon_found`."""
        epochs = (epoch - 1, epoch)  # the last pass was of this one if nobody calls set_epoch
        return self.recording.soon_found([Part(self.recording, split, rank, worker, e) for e in epochs])

    def samples(self, begun: RecordingPass, rank: int) -> Iterator[Any]:
        """What the dataset gives from sample `begun.count` on. A pass from its begin is recorded.

        The dataset's own position can't be asked for: it begins anew, and what was had is read again and let go.
        """
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(begun.number)
        part = self._part(begun, rank)
        samples = named(iter(self._dataset), part.name)
        return islice(samples, begun.count, None) if begun.count else part.recorded(samples)

    def namer(self, begun: RecordingPass, rank: int) -> Callable[[int], str]:
        """What gives the samples of a pass their names, by their numbers."""
        return self._part(begun, rank).name

    def _part(self, begun: RecordingPass, rank: int) -> Part:
        return Part(self.recording, begun.split, rank, begun.worker, begun.number)
