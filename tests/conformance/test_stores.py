"""The store's contract, held by the store as it comes and by one with the smallest segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchcache_server.store import Store
from torchcache_server.store.space import MIN_SEGMENT_BYTES

from tests.conformance.store import StoreContract


class TestStore(StoreContract):
    segment_bytes: int | None = None

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Iterator[Callable[[], Store]]:
        opened: list[Store] = []

        def open_it() -> Store:
            store = Store(
                tmp_path / "store", capacity_bytes=self.capacity_bytes, segment_bytes=self.segment_bytes
            )
            opened.append(store)
            return store

        yield open_it
        for store in opened:
            store.close()


class TestStoreWithSmallSegments(TestStore):
    segment_bytes = MIN_SEGMENT_BYTES
