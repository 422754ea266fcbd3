"""CachedIterableDataset: shards, or a recorded IterableDataset, in an order that can be resumed anywhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from torch.utils.data import IterableDataset, get_worker_info

from torchcache.connecting import connect
from torchcache.data.bad_samples import OnError, Sieve, Skips
from torchcache.data.foretelling import Foreteller, foreteller_of, ordered
from torchcache.data.formats import Format
from torchcache.data.iterable_course import Course
from torchcache.data.iterable_foretold import ShardParts, parts_in_order
from torchcache.data.iterable_order import Ints, Order, OrderKey
from torchcache.data.iterable_pass import Epoch, Pass
from torchcache.data.iterable_position import Rest, Split, Uneven
from torchcache.data.iterable_reading import Records
from torchcache.data.iterable_recording import Recorder, Recording, RecordingPass
from torchcache.data.iterable_settings import (
    one_of,
    replicas,
    shuffle_of,
    this_rank,
    this_worker,
    whole_number,
)
from torchcache.data.iterable_shards import ShardRecords
from torchcache.data.iterable_sources import Source
from torchcache.data.iterable_state import Left, after_batches, left_of, of_loader, pass_of, recording_pass_of
from torchcache.data.prefetch import Prefetch
from torchcache.data.staged import StageReport, stage_all
from torchcache.errors import ConfigurationError
from torchcache.pool import Pool, Residency

if TYPE_CHECKING:
    from torchcache.local_pool import LocalPool

WINDOW: Final = 1000


class CachedIterableDataset(IterableDataset[Any]):
    """Samples of shards in S3 or on disk, through the pool. Give it to a DataLoader as any other IterableDataset.

    It splits itself over ranks and workers, reads ahead, and is resumed exactly, at once, by the same or any other
    number of ranks and workers. Call `set_epoch` before each epoch, as for a DistributedSampler.
    """

    def __init__(
        self,
        source: Source | IterableDataset[Any],
        *,
        format: str | Format | None = None,
        shuffle: bool | Literal["records", "blocks"] = False,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
        on_error: OnError = "raise",
        uneven: Uneven = "pad",
        batch_size: int | None = None,
        window: int = WINDOW,
        num_replicas: int | None = None,
        rank: int | None = None,
        name: str | None = None,
        version: str | int | None = None,
        pool: str | Pool | LocalPool | None = None,
    ) -> None:
        """Finds the shards; those that have no index yet are read for it, here, once.

        `source` is a URI or absolute path of a shard or of a folder of them, a pattern (`{000..127}`, `*`, `**`), or a
        list of these. `format` is found from the names; else it is "tar" (WebDataset), "parquet", "arrow", "tfrecord",
        "jsonl", or an object of `torchcache.data.formats`, such as `Raw(record_bytes=3073)` or
        `Parquet(columns=["text"])`. Names that end in .zst or .gz are unpacked.

        `shuffle=True` is "records" where every record can be read alone: all records of all shards in one order. Else
        it is "blocks": the row groups, or shards, are shuffled and then `window` samples at a time are mixed; either
        can be asked for. `transform` runs on each sample, each time. `on_error="skip"` leaves out samples that are
        damaged or that `transform` raises for; they are logged, and counted in `skipped`.

        Where the samples don't divide by the ranks, `uneven="pad"` reads some twice, "drop" leaves some out, and
        "keep" reads each once, ranks then differing by one. `batch_size`, if told, is that of the loader: batches are
        then the same for any number of workers. `num_replicas` and `rank` are those of torch.distributed, or of the
        environment, unless given.

        `source` may be any IterableDataset: its first full pass is recorded, under `name` (a fingerprint of it unless
        given) and `version`, split by rank and worker as it does that itself; later passes, of later jobs too, replay
        it, shuffled if asked. Samples are what CachedDataset takes. A pass that is cut short records nothing.

        Raises ConfigurationError, ObjectNotFound for shards that aren't there, IntegrityError for damaged ones.
        """
        self._seed = whole_number(seed, "seed", None)
        self._run = whole_number(batch_size or 1, "batch_size", 1)
        self._window = whole_number(window, "window", 1)
        self._uneven = one_of(uneven, "uneven", ("pad", "drop", "keep"))
        self._on_error: OnError = one_of(on_error, "on_error", ("raise", "skip"))
        self._replicas = replicas(num_replicas, rank)
        self._transform = transform
        self._recorder = self._set_up(source, format, connect(pool), name, version)
        self._shuffle = shuffle_of(shuffle, self._records.access if self._records else "records")
        self._course = Course()
        self._skips = Skips()
        self._begun: Pass | RecordingPass | None = None
        self._foreteller: Foreteller | None = None

    def _set_up(
        self,
        source: Any,
        format: str | Format | None,
        pool: Pool,
        name: str | None,
        version: str | int | None,
    ) -> Recorder | None:
        self._records: Records | None = None
        if isinstance(source, IterableDataset):
            if format is not None:
                raise ConfigurationError(
                    "format= is for shards; what an IterableDataset gives is recorded as it is"
                )
            recorder = Recorder(Recording(pool, source, name, version), source)
            self._records = recorder.recording.open()
            return recorder
        if name is not None or version is not None:
            raise ConfigurationError(
                "name= and version= are for a recorded IterableDataset; shards have their own"
            )
        self._records = ShardRecords(pool, source, format)
        return None

    def __repr__(self) -> str:
        told = self._records.describe() if self._records else "not recorded yet"
        return f"{type(self).__name__}({told}, shuffle={self._shuffle!r})"

    def __len__(self) -> int:
        """The samples of a whole epoch that this rank reads. Raises TypeError before there is a whole recording."""
        try:
            count = self._known().count
        except ConfigurationError as error:
            raise TypeError("an IterableDataset has no length before it was recorded") from error
        split = self._split(workers=1)
        return split.share(split.total(count, self._uneven), self._where()[1], 0)

    @property
    def skipped(self) -> int:
        """Samples left out so far under `on_error="skip"`, by this process and its loader's workers."""
        return self._skips.total

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is of: each has an order of its own. Persistent workers see it too.

        Of a state that was loaded for this epoch iteration goes on; one of another epoch is let go.
        """
        self._course.say(whole_number(epoch, "epoch", 0))

    # ---- iterating ----

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._course.loaded, RecordingPass) or not self._has_records():
            return self._record()
        self._begun = begun = self._begin(take=True)
        return self._samples(begun)

    def _has_records(self) -> bool:
        """Whether they are known now; readers that have just recorded wait for the others of their epoch."""
        if self._records is None and self._recorder is not None:
            workers, worker = this_worker()
            self._records = self._recorder.soon_recorded(
                self._split(workers), self._where()[1], worker, self._course.epoch
            )
        return self._records is not None

    def _record(self) -> Iterator[Any]:
        """The wrapped dataset's own samples, recorded on their way."""
        if self._recorder is None:
            raise TypeError("only an IterableDataset is recorded")
        workers, worker = this_worker()
        loaded = self._course.taken()
        skip = loaded.count if isinstance(loaded, RecordingPass) else 0
        epoch = loaded.number if isinstance(loaded, RecordingPass) else self._course.epoch
        begun = RecordingPass(number=epoch, split=self._split(workers), worker=worker, count=skip)
        self._begun = begun
        rank = self._where()[1]
        sieve = self._sieve(self._recorder.namer(begun, rank))
        for sample in self._recorder.samples(begun, rank):
            begun.count += 1
            yield from sieve.passed(begun.count - 1, sample, self._transform)

    def _samples(self, begun: Pass) -> Iterator[Any]:
        self._course.check_seen()
        epoch, records = begun.epoch, self._known()
        order = self._order(epoch, records)
        sieve = self._sieve(records.name)
        for number, outcome in begun.samples(order, records.reading()):
            yield from sieve.passed(number, outcome, self._transform)

    def _order(self, epoch: Epoch, records: Records) -> Order:
        key = OrderKey(shuffle=self._shuffle, seed=epoch.seed, epoch=epoch.number, window=self._window)
        return Order(records.blocks, key)

    def _sieve(self, name: Callable[[int], str]) -> Sieve:
        return Sieve(self._on_error, self._skips, name)

    def _known(self) -> Records:
        """The records there are. Raises ConfigurationError while nothing is recorded."""
        if self._records is None and self._recorder is not None:
            self._records = self._recorder.recording.found()
        if self._records is None:
            raise ConfigurationError(
                f"{self!r}: nothing can be said of its samples before a full pass was made"
            )
        return self._records

    def _begin(self, *, take: bool = False) -> Pass:
        """The pass that iteration would make now. With `take` it is made: what was loaded is used up."""
        workers, worker = this_worker()
        split, rank = self._split(workers), self._where()[1]
        loaded = self._course.taken() if take else self._course.loaded
        if isinstance(loaded, Pass):
            return loaded
        left = (
            loaded
            if isinstance(loaded, Left)
            else Left(epoch=self._course.epoch, seed=self._seed, rest=Rest())
        )
        total = split.total(left.rest.left(self._known().count), self._uneven)
        epoch = Epoch(number=left.epoch, seed=left.seed, rest=left.rest, total=total, split=split)
        return Pass(epoch, rank, worker)

    def _split(self, workers: int) -> Split:
        alone = self._records is None or self._records.access == "records"
        in_pieces = self._shuffle == "blocks" or (self._shuffle == "none" and not alone)
        return Split(ranks=self._where()[0], workers=workers, run=self._run, contiguous=in_pieces)

    def _where(self) -> tuple[int, int]:
        """(ranks, rank)."""
        return self._replicas or this_rank()

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is: epoch, seed, what nobody has had of the epoch, and how far it has come since.

        A StatefulDataLoader asks its workers for it. With a plain DataLoader and workers, see `state_after`.
        Raises ConfigurationError where only the workers know.
        """
        begun = self._begun
        if get_worker_info() is None:
            if begun is None and self._course.workers_know:
                raise ConfigurationError(
                    "only the DataLoader's workers know the position: use torchdata's StatefulDataLoader and its "
                    "state_dict, or state_after(batches=...)"
                )
            if begun is not None and begun.number != self._course.epoch:
                begun = None  # the next epoch has been said, and nothing of it read
        if isinstance(begun, RecordingPass) or (begun is None and self._records is None):
            workers, worker = this_worker()
            return (begun or RecordingPass(self._course.epoch, self._split(workers), worker)).state()
        return self._told(begun or self._begin())

    def state_after(self, *, batches: int, batch_size: int, num_workers: int) -> dict[str, Any]:
        """The state once each rank has had so many batches of this epoch from a plain DataLoader.

        They count from the epoch's begin, or from the state that was loaded for it. All ranks are taken to be in step.
        """
        epoch = dataclasses.replace(self._begin().epoch, split=self._split(max(1, num_workers)))
        return self._told(self._going_on(after_batches(epoch, batches, batch_size)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state` at the next iteration: a state of this dataset, or of a StatefulDataLoader over it.

        A loader's own `load_state_dict` is for the same number of workers and ranks. For others give its state to
        this method, in the main process, and then make the new loader; one rank's state is enough, as ranks are in
        step (with `uneven="keep"` that of rank 0). Raises ConfigurationError for a state of other samples, or of some
        workers only.
        """
        states = of_loader(state)
        in_worker = get_worker_info() is not None
        loaded = self._recording_pass(states) or self._pass_or_left(states, in_worker=in_worker)
        self._begun = None
        spent = isinstance(loaded, Left) and not in_worker and self._going_on(loaded).epoch.total == 0
        self._course.load(loaded, spent=spent)

    def _recording_pass(self, states: Sequence[Mapping[str, Any]]) -> RecordingPass | None:
        """The pass of the wrapped dataset that goes on, if they are states of one."""
        if "recording" not in states[0]:
            return None
        workers, worker = this_worker()
        found = recording_pass_of(states[0])
        if len(states) > 1 or found.split != self._split(workers) or found.worker != worker:
            raise ConfigurationError(
                "a pass over the IterableDataset itself, before it is recorded, goes on only by the load_state_dict "
                "of a StatefulDataLoader with the same ranks and workers"
            )
        return found

    def _pass_or_left(self, states: Sequence[Mapping[str, Any]], *, in_worker: bool) -> Pass | Left:
        for state in states:
            if state.get("records") != self._identity():
                raise ConfigurationError(
                    "this position was saved over other samples, or in an order of another kind: it would mean other "
                    "samples. Resume with the shards, format, shuffle and window it was saved with, or start anew"
                )
        workers, worker = this_worker()
        if in_worker and len(states) == 1:
            same = pass_of(states[0], self._split(workers), self._where()[1], worker)
            if same is not None:
                return same
        return left_of(states)

    def identity(self) -> dict[str, Any]:
        """Which samples these are. Plain values, equal only for datasets whose positions mean the same samples."""
        if self._recorder is not None:
            return {"recording": str(self._recorder)}
        return {"shards": self._known().describe(), "digest": self._known().digest}

    def _going_on(self, left: Left) -> Pass:
        """A pass of one worker over what is left."""
        split = self._split(1)
        total = split.total(left.rest.left(self._known().count), self._uneven)
        epoch = Epoch(number=left.epoch, seed=left.seed, rest=left.rest, total=total, split=split)
        return Pass(epoch, self._where()[1], 0)

    def _told(self, begun: Pass) -> dict[str, Any]:
        return {**begun.state(), "records": self._identity()}

    def _identity(self) -> str:
        return f"{self._known().digest}-{self._shuffle}-{self._window}"

    # ---- the pool ----

    def stage(
        self, *, progress: bool = True, on_missing: Literal["raise", "report"] = "raise"
    ) -> StageReport:
        """Brings every shard into the pool before its use; says at the end whether all of it is there.

        As `CachedDataset.stage` does, of shards. Raises ConfigurationError for an IterableDataset, which is recorded by
        a pass.
        """
        records = self._records
        if not isinstance(records, ShardRecords):
            raise ConfigurationError(
                "an IterableDataset is recorded by a full pass over it; only shards are staged"
            )
        return stage_all(
            records.pool,
            records,
            lambda advance, missing: records.pool.stage(
                records.shards(), namespace=records.namespace, on_progress=advance, on_missing=missing
            ),
            count=records.shard_count,
            noun="shards",
            progress=progress,
            on_missing=on_missing,
        )

    def prefetch(self, epoch: int, *, epochs: int | None = 1, num_workers: int = 1) -> Prefetch:
        """Stages in the background what this rank will read in `epoch`, in its order; returns at once.

        As `CachedDataset.prefetch`, without a sampler: the order is the dataset's own. `epochs=None` goes on with all
        that follow. `num_workers` is the loader's; it matters where each worker reads a piece of its own. Progress
        counts what is read as one: records, row groups, or whole shards, of which all columns are fetched.

        Raises ConfigurationError for an IterableDataset, whose samples no server can fetch.
        """
        records = self._records
        if not isinstance(records, ShardRecords):
            raise ConfigurationError("what is recorded of an IterableDataset is in the pool, or nowhere")
        parts, begun = ShardParts(records), self._begin().epoch
        split = self._split(whole_number(num_workers, "num_workers", 0) or 1)

        def order_of(number: int) -> Ints:
            rest, seed = (begun.rest, begun.seed) if number == begun.number else (Rest(), self._seed)
            total = split.total(rest.left(records.count), self._uneven)
            told = Epoch(number=number, seed=seed, rest=rest, total=total, split=split)
            return parts_in_order(parts, self._order(told, records), told, self._where()[1])

        prefetch = ordered(
            order_of, epoch=whole_number(epoch, "epoch", 0), epochs=epochs, running=self._course.epoch
        )
        if self._foreteller is None or self._foreteller.pid != os.getpid():
            self._foreteller = foreteller_of(self, records.pool, records.namespace, parts)
        self._foreteller.add(prefetch)
        return prefetch

    def residency(self) -> Residency:
        """How much of the shards, or of what was recorded, the pool holds now."""
        return self._known().residency()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no torch.distributed: it is told its rank.
        ranks, rank = self._where()
        replicas = (ranks, rank) if ranks > 1 else self._replicas
        return {**self.__dict__, "_begun": None, "_foreteller": None, "_replicas": replicas}
