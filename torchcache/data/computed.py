"""Samples that a dataset computes: kept in the pool once computed, and computed again where they are not there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torchcache.data import codec
from torchcache.data.naming import each, say_which, together
from torchcache.data.process_errors import is_of_one_sample
from torchcache.data.samples import OnMissing, OnProgress, residency_of, windows
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectNotFound,
    OutOfSpace,
    TorchCacheError,
    TransientError,
)
from torchcache.model import SAMPLES, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool, Residency

_log = logging.getLogger("torchcache")

_STAGE_SAMPLES = 16
"""Samples computed before they are written when staging: bounds memory where samples are large."""

_UNREADABLE: Final = object()


def _told(error: Exception) -> TorchCacheError:
    """What a dataset raised, as an error that pickles."""
    if isinstance(error, TorchCacheError):
        return error
    told = TorchCacheError(f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How samples become bytes: by the typed codec, or by two functions of the user's, `encode` and `decode`."""

    encode: Callable[[Any], bytes | bytearray | memoryview] | None = None
    decode: Callable[[memoryview], Any] | None = None

    def __post_init__(self) -> None:
        if (self.encode is None) != (self.decode is None):
            raise ConfigurationError("encode= and decode= belong together: give both or neither")

    def to_record(self, sample: Any) -> memoryview:
        """A new writable buffer. Raises UnsupportedSample, or what `encode` raises."""
        return codec.encode_custom(self.encode(sample)) if self.encode else codec.encode(sample)

    def from_record(self, record: memoryview) -> Any:
        """A sample that shares no memory with a read-only `record`, unless the user's `decode` lets it."""
        return self.decode(codec.decode_custom(record)) if self.decode else codec.decode(record)


class ComputedSamples:
    """The samples of a map-style dataset, under a name and a version."""

    def __init__(self, pool: Pool, dataset: Any, name: str, version: str, encoding: Encoding) -> None:
        self._pool = pool
        self._dataset = dataset
        self._name = name
        self._version = version
        self._encoding = encoding
        self._length = len(dataset)
        self._namespace = f"{SAMPLES}:{name}@{version}"
        self._warned = False
        self._unkept = 0

    def __len__(self) -> int:
        return self._length

    @property
    def total_bytes(self) -> None:
        return None

    @property
    def stored_under(self) -> None:
        return None

    def read(self, indices: Sequence[int]) -> list[Any]:
        wanted = list(dict.fromkeys(indices))
        records, failed = self._ask(wanted, whole=True)
        samples = self._decoded(records)
        missing = [i for i in wanted if i not in samples]
        if missing:
            fresh = self._compute(missing)
            self._keep(fresh, failed)
            samples |= self._each(self._encoding.from_record, fresh.values(), list(fresh))
            records |= fresh
        return [self._take(i, samples, records) for i in indices]

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        return [Extent(self._object(index)) for index in indices]

    def _ask(
        self, indices: Sequence[int], *, whole: bool
    ) -> tuple[dict[int, memoryview], dict[int, TorchCacheError]]:
        """What the pool holds of `indices`, and why not the rest. Raises what computing again doesn't mend.

        Not `whole` asks for one byte each: it proves that a sample is there, and costs no more than its first block.
        """
        extents = [Extent(self._object(i), 0, -1 if whole else 1) for i in indices]
        try:
            found = self._pool.read_each(extents, namespace=self._namespace, resident_only=True)
        except TransientError as error:
            found = [error] * len(extents)
        records: dict[int, memoryview] = {}
        failed: dict[int, TorchCacheError] = {}
        for index, outcome in zip(indices, found, strict=True):
            if isinstance(outcome, memoryview):
                records[index] = outcome
            elif isinstance(outcome, ObjectNotFound | TransientError | IntegrityError):
                failed[index] = outcome
            else:
                raise outcome
        return records, failed

    def _decoded(self, records: dict[int, memoryview]) -> dict[int, Any]:
        """The samples of `records`; those of a format that is no longer read count as missing."""
        found = self._each(self._readable, records.values(), list(records))
        return {index: sample for index, sample in found.items() if sample is not _UNREADABLE}

    def _readable(self, record: memoryview) -> Any:
        try:
            return self._encoding.from_record(record)
        except IntegrityError as error:
            self._warn_once("a stored sample can't be read and is computed again", error)
            return _UNREADABLE

    def _each(
        self, make: Callable[[Any], Any], items: Iterable[Any], indices: Sequence[int]
    ) -> dict[int, Any]:
        made = each(make, [*items], lambda n: self.name(indices[n]))
        return dict(zip(indices, made, strict=True))

    def _take(self, index: int, samples: dict[int, Any], records: dict[int, memoryview]) -> Any:
        """The sample, the first time; a copy of its own for an index that stands in the batch again."""
        if index in samples:
            return samples.pop(index)
        return self._encoding.from_record(records[index].toreadonly())

    def _compute(self, indices: list[int]) -> dict[int, memoryview]:
        """Records of what the dataset returns. Epochs must not differ, so the first is served from these too."""
        many = getattr(self._dataset, "__getitems__", None)
        if callable(many):
            samples = self._computed_together(many, indices)
        else:
            samples = [*self._each(lambda i: self._dataset[i], indices, indices).values()]
        return self._each(self._encoding.to_record, samples, indices)

    def _computed_together(self, many: Callable[[list[int]], Any], indices: list[int]) -> Any:
        try:
            samples = many(indices)
        except Exception as error:
            say_which(error, lambda: f"{together(indices)} of {self._label}")
            raise
        if len(samples) != len(indices):
            raise ConfigurationError(
                f"__getitems__ of {type(self._dataset).__name__} returned {len(samples)} samples "
                f"for {len(indices)} indices"
            )
        return samples

    def _keep(self, records: dict[int, memoryview], failed: dict[int, TorchCacheError]) -> None:
        """Writes `records`. Training doesn't fail because the pool can't take them: that is counted, and told once.

        Those whose read met a server in trouble are not written: it would be asked again, and waited for again.
        """
        unreachable = {i for i, error in failed.items() if isinstance(error, TransientError)}
        rows = [i for i in records if i not in unreachable]
        if unreachable:
            self._warn_once("computed samples are not kept", failed[min(unreachable)])
        try:
            if rows:
                self._write({i: records[i] for i in rows})
        except (OutOfSpace, TransientError, IntegrityError) as error:
            self._warn_once("computed samples are not kept", error)
            rows = []
        self._unkept += len(records) - len(rows)

    def _write(self, records: dict[int, memoryview]) -> None:
        self._pool.write(self._namespace, [(self._object(i).id, [r]) for i, r in records.items()])

    def _warn_once(self, what: str, error: TorchCacheError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("dataset %s: %s (said once): %s", self._name, what, error)

    def stage(
        self,
        indices: Sequence[int],
        *,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        on_missing: OnMissing | None = None,
    ) -> None:
        for window in windows(indices, _STAGE_SAMPLES):
            if cancelled():
                return
            _, failed = self._ask(window, whole=False)
            for error in failed.values():
                if isinstance(error, TransientError):
                    raise error
            records = self._compute_for_stage(list(failed), on_missing)
            if records:
                self._write(records)
            missed = len(failed) - len(records)
            on_progress(len(window) - missed, sum(map(len, records.values())))

    def _compute_for_stage(self, indices: list[int], on_missing: OnMissing | None) -> dict[int, memoryview]:
        """As `_compute`; with `on_missing` what the dataset raises for a sample is no matter of the others."""
        if not indices:
            return {}
        handled = sys.exception()
        try:
            return self._compute(indices)
        except Exception as error:
            if on_missing is None or not is_of_one_sample(error, handled):
                raise
            if len(indices) == 1:
                on_missing(self._object(indices[0]), _told(error))
                return {}
        each = [self._compute_for_stage([index], on_missing) for index in indices]
        return {index: record for records in each for index, record in records.items()}

    def absent(self) -> Iterator[tuple[ObjectInfo, TorchCacheError]]:
        for window in windows(range(self._length)):
            _, failed = self._ask(window, whole=False)
            for index, error in failed.items():
                yield self._object(index), error

    def residency(self) -> Residency:
        return residency_of(self._pool, self._object, self._length)

    def identity(self) -> dict[str, str | int]:
        return {"name": self._name, "version": self._version, "count": self._length}

    def keys(self) -> list[str]:
        raise ConfigurationError("computed samples have no keys; only a dataset made by from_files has")

    def name(self, index: int) -> str:
        return f"sample {index} of {self._label}"

    @property
    def _label(self) -> str:
        return f"{self._name}@{self._version}"

    def describe(self) -> str:
        unkept = f", {self._unkept:,} could not be kept" if self._unkept else ""
        return (
            f"({type(self._dataset).__name__}, name={self._name!r}, version={self._version!r}: "
            f"{self._length:,} samples{unkept})"
        )

    def _object(self, index: int) -> ObjectInfo:
        return ObjectInfo(ObjectId(SAMPLES, f"{self._name}/{index}", self._version), UNKNOWN_SIZE)
