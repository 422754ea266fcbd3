"""CachedDataset: a map-style dataset whose samples come from the pool."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset, IterableDataset

from torchcache.connecting import connect
from torchcache.data.bad_samples import OnError, Skips, Transform, skips_under, those_readable
from torchcache.data.buffer_pool import BufferPool
from torchcache.data.computed import ComputedSamples, Encoding
from torchcache.data.file_records import FileRecords
from torchcache.data.files import FileSamples, OnChange
from torchcache.data.fingerprint import fingerprint
from torchcache.data.foretelling import Foreteller, foreteller_of, ordered
from torchcache.data.listing import Changes
from torchcache.data.naming import each, numbered
from torchcache.data.outputs import Output
from torchcache.data.prefetch import ComputedPrefetch, Orders, Prefetch
from torchcache.data.samples import Samples
from torchcache.data.staged import StageReport, stage_all
from torchcache.errors import ConfigurationError
from torchcache.model import SAVE_PREFIX
from torchcache.placement import Placement
from torchcache.pool import Pool, Residency
from torchcache.pool.routing import main_owner

if TYPE_CHECKING:
    from torchcache.local_pool import LocalPool


class CachedDataset(Dataset[Any]):
    """A map-style dataset behind the cache. Give it to a DataLoader as any other.

    A batch is one request to the pool, not one a sample. Pickles, forks and spawns; nothing is opened before the first
    use in each process.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str | None = None,
        version: str | int | None = None,
        transform: Transform | None = None,
        encode: Callable[[Any], bytes | bytearray | memoryview] | None = None,
        decode: Callable[[memoryview], Any] | None = None,
        on_error: OnError = "raise",
        pool: str | Pool | LocalPool | None = None,
    ) -> None:
        """Caches what `dataset[i]` returns: computed once, then read from the pool, by this job and later ones.

        Samples are nested dict, list, tuple, namedtuple and dataclass of tensors, numpy arrays, bytes, str, numbers
        and None, stored without pickle; for others give `encode` (sample -> bytes) and `decode` (read-only memoryview
        -> sample). `transform` runs after the cache, each time: random augmentation belongs there.

        `name` says which samples these are. Its default is a fingerprint of the dataset's class and arguments. Give
        another `version` when samples change for a reason that the fingerprint can't see. `pool` is what
        `torchcache.connect` takes.

        With `on_error="skip"` a batch is short of the samples for which the dataset, `encode`, `decode` or `transform`
        raises; they are logged, and counted in `skipped`. What is asked for alone, by `dataset[i]`, is raised still.

        Raises ConfigurationError: no map-style dataset; a name is needed. Raises TypeError for an IterableDataset.
        """
        length = _checked_length(dataset)
        skips = skips_under(on_error)
        encoding = Encoding(encode=encode, decode=decode)
        if name is None and encode is not None:
            raise ConfigurationError(
                "with encode= and decode= pass name= too: functions can't be fingerprinted"
            )
        if name is None:
            name = f"{type(dataset).__name__}-{length}-{fingerprint(dataset)}"
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"name= must be a str that isn't empty, not {name!r}")
        label = "0" if version is None else str(version)
        if not label or label.startswith(SAVE_PREFIX):
            raise ConfigurationError(
                f"version= must not be empty or start with {SAVE_PREFIX!r}, it is {label!r}"
            )
        connected = connect(pool)
        self._set_up(connected, ComputedSamples(connected, dataset, name, label, encoding), transform, skips)

    @classmethod
    def from_files(
        cls,
        uri: str | os.PathLike[str],
        *,
        pattern: str = "*",
        decode: Callable[[memoryview], Any] | None = None,
        transform: Transform | None = None,
        output: Output = "bytes",
        buffers: BufferPool | None = None,
        record_bytes: int | None = None,
        on_change: OnChange = "raise",
        on_error: OnError = "raise",
        pool: str | Pool | LocalPool | None = None,
    ) -> CachedDataset:
        """The objects under the folder `uri`, one a sample, ordered by key, bytewise; listed once, here.

        `uri` is a URI ("s3://bucket/images") or an absolute path ("/data/images", the same as "file:///data/images").
        `pattern` is matched as by fnmatch against the key relative to `uri`; `*` crosses slashes. A sample is what
        `decode` makes of a read-only memoryview of the object; without it, what `output` says:

        - "bytes": a copy as `bytes`.
        - "view": the read-only memoryview, without a copy. It stays valid as long as you keep it, and holds with it
          what it is a part of: a file of the store, or the batch it came in. It doesn't pickle, so it has to become
          something else before it leaves a DataLoader's worker.
        - "tensor", "numpy": a writable tensor or array of uint8 in a buffer of `buffers` (default: one pool of 1 GB
          for each process). It is yours while you keep it or anything made of it without a copy; then the buffer is
          used again. Samples of a batch share a buffer, so keep a `.clone()` where you keep one of many.

        Then `transform` runs on the sample. With `record_bytes` a sample is not a whole object but a record of that
        size in one; objects are whole numbers of records, end to end.

        An object that is another now than when it was listed is ObjectChanged, naming it. `on_change="refresh"` reads
        it as it is now instead, under the same index; not with `record_bytes`. For new objects there is `refresh`.

        With `on_error="skip"` a batch is short of the samples that are gone, changed or damaged, and of those for which
        `decode` or `transform` raises; they are logged, and counted in `skipped`. What is asked for alone, by
        `dataset[i]`, is raised still, and so is what is no matter of one sample, as a server that can't be reached.

        Raises ConfigurationError for a bad URI, wrong arguments or missing credentials, ObjectNotFound if the bucket
        doesn't exist or nothing matches.
        """
        dataset = cls.__new__(cls)
        skips = skips_under(on_error)
        kind: Callable[..., FileSamples] = (
            FileSamples if record_bytes is None else partial(FileRecords, record_bytes=record_bytes)
        )
        connected = connect(pool)
        samples = kind(
            connected, uri, pattern, decode=decode, output=output, buffers=buffers, on_change=on_change
        )
        dataset._set_up(connected, samples, transform, skips)
        return dataset

    def _set_up(self, pool: Pool, samples: Samples, transform: Transform | None, skips: Skips | None) -> None:
        self._pool = pool
        self._samples = samples
        self._foreteller: Foreteller | None = None
        self._transform = transform
        self._skips = skips

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        """Sample `index`; negative ones count from the end. Raises IndexError beyond either."""
        return self._read(_positions([index], len(self)))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of `indices`, in order, without those left out. What a DataLoader calls for a batch."""
        positions = _positions(indices, len(self))
        if self._skips is None:
            return self._read(positions)
        return those_readable(self._samples, positions, self._transform, self._skips)

    def _read(self, positions: Sequence[int]) -> list[Any]:
        samples, transform = self._samples.read(positions), self._transform
        return samples if transform is None else each(transform, samples, lambda n: self._name(positions[n]))

    def _name(self, position: int) -> str:
        return numbered(position, self._samples.name(position))

    @property
    def skipped(self) -> int:
        """Samples left out so far under `on_error="skip"`, by this process and its loader's workers."""
        return 0 if self._skips is None else self._skips.total

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._samples.describe()}"

    def owners(self, indices: Sequence[int], placement: Placement) -> list[str]:
        """Of each sample the id of the server that owns most of it, were `placement` the pool's."""
        return [main_owner(extent, placement) for extent in self._samples.extents(indices)]

    @property
    def pool(self) -> Pool:
        """The pool that the samples are cached in."""
        return self._pool

    def keys(self) -> list[str]:
        """The samples' keys relative to the URI of `from_files`, in order: for labels that stand in paths.

        Raises ConfigurationError for computed samples.
        """
        return self._samples.keys()

    def refresh(self) -> Changes:
        """Lists the files of `from_files` anew, between two epochs, and says which were added, removed or changed.

        Samples may stand at other indices then, so samplers must be made anew, and states of before are refused.
        Workers that are started later see it. What hasn't changed stays in the pool. Raises ConfigurationError for
        computed samples, else what `from_files` raises; then nothing is changed.
        """
        if not isinstance(self._samples, FileSamples):
            raise ConfigurationError("only the files of from_files are listed, and so listed anew")
        if self._foreteller is not None:
            self._foreteller.stop()  # what it told is of other indices
            self._foreteller = None
        return self._samples.refresh()

    def identity(self) -> dict[str, str | int]:
        """Which samples these are: equal for equal ones, also in another process or a later job."""
        return self._samples.identity()

    def state_dict(self) -> dict[str, str | int]:
        """Which samples these are, so that a resumed job notices if they are others. The position is the sampler's."""
        return self._samples.identity()

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Raises ConfigurationError if `state` is that of a dataset with other samples."""
        now = self._samples.identity()
        changed = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in now.items() if state.get(k) != v]
        if changed:
            raise ConfigurationError(
                f"this position was saved over other samples ({'; '.join(changed)}): an index would mean another "
                "sample. Resume with the dataset it was saved with, or start the epoch anew without this state"
            )

    def stage(
        self, *, progress: bool = True, on_missing: Literal["raise", "report"] = "raise"
    ) -> StageReport:
        """Brings every sample into the pool before its use; says at the end whether all of it is there.

        With a progress bar on stderr, lines of the log "torchcache" where that is no terminal, unless told otherwise.
        All are tried. If some can't be fetched or kept, the log says how many, at which servers, and why, and the first
        error is raised; with `on_missing="report"` the report that is returned lists them instead. Computed samples
        are computed here, in this process; the first one that can't be ends it, but for `on_missing="report"`.
        """
        samples, everything = self._samples, range(len(self))
        ends_at_first = samples.stored_under is None and on_missing == "raise"
        return stage_all(
            self._pool,
            samples,
            lambda advance, missing: samples.stage(
                everything,
                on_progress=advance,
                cancelled=lambda: False,
                on_missing=None if ends_at_first else missing,
            ),
            count=len(self),
            noun="samples",
            progress=progress,
            on_missing=on_missing,
        )

    def prefetch(self, sampler: Iterable[Any], epoch: int, *, epochs: int | None = 1) -> Prefetch:
        """Stages in the background what `sampler` will give in `epoch`, in its order; returns at once.

        `sampler` is a sampler or batch sampler over this dataset, a distributed one too; a copy of it is asked, after
        `set_epoch(epoch)` if it has that. Only an order that is a function of the epoch or of a generator of the
        sampler's own can be foreseen; with another everything is staged, in some order.

        The pool is told the order, and while it knows it evicts what this reader needs farthest in the future. Readers
        that wait come first. What doesn't fit is fetched as training makes room. With `epochs` the next ones follow as
        training gets there, None of them being the last: say `prefetch(sampler, first_epoch, epochs=None)` once.
        Computed samples are computed here instead, those of `epoch` alone; the first that can't be ends it, unless they
        are skipped.

        Raises ConfigurationError: the sampler can't be copied, or has no `set_epoch` for several epochs.
        """
        if epochs is not None and epochs < 1:
            raise ConfigurationError(f"epochs={epochs}: it is a number above 0, or None for all that follow")
        orders = Orders(sampler, (self, self._samples))
        if epochs != 1 and not orders.by_epoch:
            raise ConfigurationError(
                f"epochs= needs a sampler whose order follows from set_epoch; {type(sampler).__name__} has none"
            )
        namespace = self._samples.stored_under
        count = len(self)
        if namespace is None:
            positions = _positions(dict.fromkeys(orders.once(epoch)), count)
            stage = self._samples.stage
            return ComputedPrefetch(
                lambda i, advance, stop, missing: stage(
                    i, on_progress=advance, cancelled=stop, on_missing=missing if self._skips else None
                ),
                positions,
                epoch,
            )
        first = _positions(orders.once(epoch), count)
        prefetch = ordered(
            lambda number: first if number == epoch else _positions(orders.of(number), count),
            epoch=epoch,
            epochs=epochs,
            running=orders.epoch,
        )
        if self._foreteller is None or self._foreteller.pid != os.getpid():
            self._foreteller = foreteller_of(self, self._pool, namespace, self._samples)
        self._foreteller.add(prefetch)
        return prefetch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_foreteller": None}

    def residency(self) -> Residency:
        """How much of the dataset the pool holds now."""
        return self._samples.residency()


def _positions(indices: Iterable[int], count: int) -> list[int]:
    """Indices, negative ones counted from the end of `count`. Raises IndexError beyond either."""
    return [i if 0 <= i < count else _position(i, count) for i in map(operator.index, indices)]


def _position(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"index {index} is out of range: the dataset has {count} samples")
    return index % count


def _checked_length(dataset: Any) -> int:
    """The dataset's length. Raises ConfigurationError, and TypeError for an IterableDataset, if it isn't map-style."""
    kind = type(dataset).__name__
    if isinstance(dataset, str | bytes | os.PathLike):
        raise ConfigurationError(
            f"CachedDataset wraps a dataset, not {kind}: for a URI or a path use CachedDataset.from_files"
        )
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"CachedDataset needs a map-style dataset, with __getitem__; {kind} is an IterableDataset: wrap it in "
            "torchcache.CachedIterableDataset, which records its first full pass"
        )
    if not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"CachedDataset needs a map-style dataset, with __getitem__; {kind} has none"
        )
    try:
        return len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"CachedDataset needs a dataset with a length; {kind} has none") from error
