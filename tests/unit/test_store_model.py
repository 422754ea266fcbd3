"""The store against a model that is a dict, through puts, evictions, damage, crashes and restarts in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torchcache_server.store import Store
from torchcache_server.store.space import MIN_SEGMENT_BYTES

from tests.unit.store_parts import chunk, crash_image, payload
from torchcache.errors import OutOfSpace

NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(0, 40)
SIZE = 600_000
CAPACITY = 3 * MIN_SEGMENT_BYTES  # some twenty chunks


class StoreMachine(RuleBasedStateMachine):
    """`model` maps a chunk's number to its namespace while it must be there; others may be, or may have yielded."""

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="torchcache-model-"))
        self.turn = 0
        self.kept: set[str] = set()
        self.model: dict[int, str] = {}
        self.store = Store(self.folder / "0", capacity_bytes=CAPACITY, segment_bytes=MIN_SEGMENT_BYTES)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(name=NAMES, numbers=st.lists(NUMBERS, min_size=1, max_size=8))
    def put_many(self, name: str, numbers: list[int]) -> None:
        there = {n for n in numbers if self.store.contains(chunk(n))}
        try:
            put = self.store.put_many(name, [(chunk(n), SIZE, payload(n, SIZE)) for n in numbers])
        except OutOfSpace:
            assert {n for n in numbers if self.store.contains(chunk(n))} <= there
            return
        assert [bytes(c.payload) for c in put] == [payload(n, SIZE) for n in numbers]
        for n in set(numbers) - there:
            assert self.store.contains(chunk(n))
            self.model[n] = name

    @rule(number=NUMBERS)
    def look_up(self, number: int) -> None:
        found = self.store.lookup(chunk(number))
        assert (found is not None) == self.store.contains(chunk(number))
        if found is not None:
            assert bytes(found.payload) == payload(number, SIZE)

    @rule(name=NAMES, keep=st.booleans())
    def keep(self, name: str, keep: bool) -> None:
        self.store.keep(name, keep)
        (self.kept.add if keep else self.kept.discard)(name)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        self.store.drop(name)
        self.kept.discard(name)
        for n in [n for n, owner in self.model.items() if owner == name]:
            assert not self.store.contains(chunk(n))
            del self.model[n]

    @rule(number=NUMBERS)
    def quarantine(self, number: int) -> None:
        self.store.quarantine(chunk(number))
        self.model.pop(number, None)
        assert not self.store.contains(chunk(number))

    @rule()
    def restart(self) -> None:
        before = (self.store.namespaces(), self.resident())
        self.store.close()
        self.reopen(self.folder / str(self.turn))
        assert (self.store.namespaces(), self.resident()) == before

    @rule()
    def crash(self) -> None:
        before = self.resident()
        self.turn += 1
        image = crash_image(self.folder / str(self.turn - 1), self.folder / str(self.turn))
        self.store.close()
        shutil.rmtree(self.folder / str(self.turn - 1))
        self.reopen(image)
        assert self.resident() == before

    def reopen(self, path: Path) -> None:
        self.store = Store(path, capacity_bytes=CAPACITY, segment_bytes=MIN_SEGMENT_BYTES)

    def resident(self) -> set[int]:
        return {n for n in range(41) if self.store.contains(chunk(n))}

    @invariant()
    def what_is_kept_is_there(self) -> None:
        """I6. What isn't kept may have yielded; the model forgets it then."""
        for n, owner in list(self.model.items()):
            if not self.store.contains(chunk(n)):
                assert owner not in self.kept
                del self.model[n]

    @invariant()
    def the_books_agree(self) -> None:
        usage, namespaces = self.store.usage(), self.store.namespaces()
        assert usage.used_bytes == sum(n.bytes for n in namespaces) <= CAPACITY
        assert usage.chunks == sum(n.chunks for n in namespaces) == len(self.resident())
        assert {n.name for n in namespaces if n.kept} == self.kept


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestStoreAgainstADict = StoreMachine.TestCase
