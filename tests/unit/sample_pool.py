"""MemoryPool with computed samples, and failures to order: for the datasets' logic, which needs no server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.unit.memory_pool import MemoryPool
from torchcache.errors import NotResident, TorchCacheError
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import Residency


class SamplePool(MemoryPool):
    """Keeps what is written under `samples`; serves it read-only, as the real pool does."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: dict[ObjectId, bytes] = {}
        self.namespaces: set[str] = set()
        self.write_error: TorchCacheError | None = None
        self.read_error: TorchCacheError | None = None
        self.writes: list[list[ObjectId]] = []

    def uri(self, object: ObjectId) -> str:
        return f"samples/{object.key}" if object.is_sample else super().uri(object)

    def read_each(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        resident_only: bool = False,
        as_bytes: bool = False,
        timeout_s: float = 60.0,
    ) -> list[memoryview | TorchCacheError]:
        self.namespaces.add(namespace)
        if not resident_only:
            return super().read_each(extents, namespace=namespace, into=into)
        self.reads.append(list(extents))
        return [self._sample(extent) for extent in extents]

    def _sample(self, extent: Extent) -> memoryview | TorchCacheError:
        if self.read_error:
            return self.read_error
        record = self.samples.get(extent.object.id)
        if record is None:
            return NotResident("not here", object=str(extent.object.id))
        return memoryview(record)[extent.offset :][: extent.length if extent.length >= 0 else None]

    def write(
        self,
        namespace: str,
        objects: Sequence[tuple[ObjectId, Sequence[memoryview]]],
        *,
        durable: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        if self.write_error:
            raise self.write_error
        self.namespaces.add(namespace)
        self.writes.append([object for object, _ in objects])
        for object, buffers in objects:
            self.samples.setdefault(object, b"".join(buffers))

    def residency(self, objects: Sequence[ObjectInfo]) -> Residency:
        self.resident |= self.samples.keys()
        if objects and objects[0].id.is_sample:
            held = sum(o.id in self.samples for o in objects)
            return Residency(objects=len(objects), resident_objects=held, bytes=0, resident_bytes=0)
        return super().residency(objects)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[SamplePool]:
    """A SamplePool that CachedDataset takes as `pool=`."""
    monkeypatch.setattr("torchcache.data.cached.connect", lambda given: given)
    yield SamplePool()
