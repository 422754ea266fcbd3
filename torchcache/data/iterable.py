"""CachedIterableDataset: shards, or a recorded IterableDataset, in an order that can be resumed anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from torchcache import environment
from torchcache.connecting import connect
from torchcache.data.formats import Format
from torchcache.data.iterable_order import Order, OrderKey, Shuffle
from torchcache.data.iterable_pass import Epoch, OnError, Pass, Sieve
from torchcache.data.iterable_position import Rest, Split, Uneven
from torchcache.data.iterable_shards import ShardRecords
from torchcache.data.iterable_sources import Source
from torchcache.data.iterable_state import Left, after_batches, left_of, of_loader, pass_of
from torchcache.data.progress import progress_bar
from torchcache.errors import ConfigurationError
from torchcache.pool import Pool, Residency

if TYPE_CHECKING:
    from torchcache.local_pool import LocalPool

WINDOW: Final = 1000

# Places in the memory that a dataset shares with its workers; the last are counts of what each worker skipped.
_EPOCH, _LOADS, _USED_BY, _WORKING, _SKIPPED = range(5)
_SHARED: Final = 128


class CachedIterableDataset(IterableDataset[Any]):
    """Samples of shards in S3 or on disk, through the pool. Give it to a DataLoader as any other IterableDataset.

    It splits itself over ranks and workers, reads ahead, and is resumed exactly, at once, by the same or any other
    number of ranks and workers. Call `set_epoch` before each epoch, as for a DistributedSampler.
    """

    def __init__(
        self,
        source: Source,
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

        Raises ConfigurationError, ObjectNotFound for shards that aren't there, IntegrityError for damaged ones.
        """
        self._seed = _checked(seed, "seed", None)
        self._run = _checked(batch_size or 1, "batch_size", 1)
        self._window = _checked(window, "window", 1)
        self._uneven = _one_of(uneven, "uneven", ("pad", "drop", "keep"))
        self._on_error: OnError = _one_of(on_error, "on_error", ("raise", "skip"))
        self._replicas = _replicas(num_replicas, rank)
        self._transform = transform
        self._records = ShardRecords(connect(pool), source, format)
        self._shuffle = _shuffle(shuffle, self._records)
        self._shared = torch.zeros(_SHARED, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._loads = 0
        self._loaded: Left | Pass | None = None
        self._begun: Pass | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.describe()}, shuffle={self._shuffle!r})"

    def __len__(self) -> int:
        """The samples of a whole epoch that this rank reads."""
        split = self._split(workers=1)
        return split.share(split.total(self._records.count, self._uneven), self._where()[1], 0)

    @property
    def skipped(self) -> int:
        """Samples left out so far under `on_error="skip"`, by this process and its loader's workers."""
        return int(self._shared[_SKIPPED:].sum())

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is of: each has an order of its own. Persistent workers see it too.

        Of a state that was loaded for this epoch iteration goes on; one of another epoch is let go.
        """
        self._shared[_EPOCH] = _checked(epoch, "epoch", 0)
        if isinstance(self._loaded, Left) and self._loaded.epoch != epoch:
            self._loaded = None

    # ---- iterating ----

    def __iter__(self) -> Iterator[Any]:
        self._begun = self._begin(take=True)
        return self._samples(self._begun)

    def _samples(self, begun: Pass) -> Iterator[Any]:
        if self._loads != int(self._shared[_LOADS]):
            raise ConfigurationError(
                "a state was loaded into the dataset when persistent workers had it already: load it before the "
                "first iteration, or make a new DataLoader"
            )
        epoch, records = begun.epoch, self._records
        key = OrderKey(shuffle=self._shuffle, seed=epoch.seed, epoch=epoch.number, window=self._window)
        order = Order(records.blocks, key)
        slot = _SKIPPED + begun.worker % (_SHARED - _SKIPPED)
        sieve = Sieve(self._on_error, self._shared[slot : slot + 1], records.name)
        for number, outcome in begun.samples(order, records.reading()):
            yield from sieve.passed(number, outcome, self._transform)

    def _begin(self, *, take: bool = False) -> Pass:
        """The pass that iteration would make now. With `take` it is made: what was loaded is used up."""
        workers, worker = _worker()
        split, rank = self._split(workers), self._where()[1]
        loaded = self._taken() if take else self._loaded
        if isinstance(loaded, Pass):
            return loaded
        left = loaded or Left(epoch=int(self._shared[_EPOCH]), seed=self._seed, rest=Rest())
        total = split.total(left.rest.left(self._records.count), self._uneven)
        epoch = Epoch(number=left.epoch, seed=left.seed, rest=left.rest, total=total, split=split)
        return Pass(epoch, rank, worker)

    def _taken(self) -> Left | Pass | None:
        """What was loaded, for the pass that begins; the next one begins anew."""
        loaded, self._loaded = self._loaded, None
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

    def _split(self, workers: int) -> Split:
        in_pieces = self._shuffle == "blocks" or (
            self._shuffle == "none" and self._records.access != "records"
        )
        return Split(ranks=self._where()[0], workers=workers, run=self._run, contiguous=in_pieces)

    def _where(self) -> tuple[int, int]:
        """(ranks, rank)."""
        return self._replicas or _distributed()

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is: epoch, seed, what nobody has had of the epoch, and how far it has come since.

        A StatefulDataLoader asks its workers for it. With a plain DataLoader and workers, see `state_after`.
        Raises ConfigurationError where only the workers know.
        """
        begun = self._begun
        if get_worker_info() is None:
            if begun is None and int(self._shared[_WORKING]):
                raise ConfigurationError(
                    "only the DataLoader's workers know the position: use torchdata's StatefulDataLoader and its "
                    "state_dict, or state_after(batches=...)"
                )
            if begun is not None and begun.epoch.number != int(self._shared[_EPOCH]):
                begun = None  # the next epoch has been said, and nothing of it read
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
        step. Raises ConfigurationError for a state of other samples, or of some workers only.
        """
        states = of_loader(state)
        for one in states:
            if one.get("records") != self._identity():
                raise ConfigurationError(
                    "this position was saved over other samples, or in an order of another kind: it would mean other "
                    "samples. Resume with the shards, format, shuffle and window it was saved with, or start anew"
                )
        workers, worker = _worker()
        same = (
            pass_of(states[0], self._split(workers), self._where()[1], worker) if len(states) == 1 else None
        )
        self._loaded = loaded = same or left_of(states)
        self._begun = None
        self._shared[_EPOCH] = loaded.epoch.number if isinstance(loaded, Pass) else loaded.epoch
        if get_worker_info() is None:
            # Workers to come go on by themselves, whatever their number.
            self._loaded = left_of(states)
            self._shared[_USED_BY] = 0
            self._shared[_LOADS] += 1
            self._loads = int(self._shared[_LOADS])

    def _going_on(self, left: Left) -> Pass:
        """A pass of one worker over what is left."""
        split = self._split(1)
        total = split.total(left.rest.left(self._records.count), self._uneven)
        epoch = Epoch(number=left.epoch, seed=left.seed, rest=left.rest, total=total, split=split)
        return Pass(epoch, self._where()[1], 0)

    def _told(self, begun: Pass) -> dict[str, Any]:
        return {**begun.state(), "records": self._identity()}

    def _identity(self) -> str:
        return f"{self._records.digest}-{self._shuffle}-{self._window}"

    # ---- the pool ----

    def stage(self, *, progress: bool = True) -> None:
        """Brings every shard into the pool before its use, with a progress bar on stderr unless told otherwise."""
        records = self._records
        stage = records.pool.stage
        if not progress:
            stage(records.shards(), namespace=records.namespace)
            return
        what = f"stage {records.shard_count:,} shards"
        with progress_bar(what, records.shard_count, records.total_bytes) as advance:
            stage(records.shards(), namespace=records.namespace, on_progress=advance)

    def residency(self) -> Residency:
        """How much of the shards the pool holds now."""
        return self._records.pool.residency(self._records.shards())

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no torch.distributed: it is told its rank.
        return {**self.__dict__, "_begun": None, "_replicas": self._where()}


def _worker() -> tuple[int, int]:
    """(workers, worker) of this process's loader; one if it has no workers."""
    info = get_worker_info()
    return (info.num_workers, info.id) if info is not None else (1, 0)


def _shuffle(given: bool | str, records: Any) -> Shuffle:
    alone = records.access == "records"
    if given is False:
        return "none"
    if given is True:
        return "records" if alone else "blocks"
    if given == "records" and records.access == "stream":
        raise ConfigurationError(
            "shuffle='records' needs records that can be read alone, and these shards are compressed or streams: use "
            "shuffle='blocks'"
        )
    if given in ("records", "blocks"):
        return given  # type: ignore[return-value]
    raise ConfigurationError(f"shuffle={given!r}: it is True, False, 'records' or 'blocks'")


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return environment.world()


def _replicas(ranks: int | None, rank: int | None) -> tuple[int, int] | None:
    if ranks is None and rank is None:
        return None
    if ranks is None or rank is None or not 0 <= rank < ranks:
        raise ConfigurationError(
            f"num_replicas={ranks}, rank={rank}: give both, with 0 <= rank < num_replicas"
        )
    return ranks, rank


def _checked(value: int, name: str, least: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigurationError(f"{name}={value!r}: it is a whole number{bound}")
    return value


def _one_of(value: Any, name: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ConfigurationError(f"{name}={value!r}: it is one of {', '.join(map(repr, known))}")
    return value
