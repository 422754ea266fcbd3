"""The store against a model that is a dict, through all that can be done to it, damage and crashes included."""

from __future__ import annotations

import logging
import os
import random
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torchcache_server.store import Store, core
from torchcache_server.store.chunk import StoredChunk, byte_view
from torchcache_server.store.policy import Policy
from torchcache_server.store.space import Space
from torchcache_server.store.store import NamespaceUsage

from tests.proofs import proof
from tests.unit.handed_out_parts import opened, write_records
from tests.unit.store_parts import (
    SMALL_SEGMENT,
    chunk,
    crash_image,
    descriptors,
    flip_bit,
    payload,
    small_store,
)
from torchcache.errors import ConfigurationError, IntegrityError, OutOfSpace
from torchcache.model import BLOCK_BYTES, block_digests
from torchcache.records import chunk_key

FEW = 100
"""Lives of the test that always runs, with one seed: a run that passed passes again."""
_SEED = os.environ.get("TORCHCACHE_MODEL_SEED")  # read at import: tests run without any TORCHCACHE_ variable
NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(0, 29)
ALL = range(30)
SIZES = (20_000, 12_000, 40_000, 100, 0)
CAPACITY = 4 * SMALL_SEGMENT  # some twenty chunks
MAX_RESTING = 1
MAX_DESCRIPTORS = MAX_RESTING + 5  # the folder, its lock, and three files of LMDB's
POLICIES = st.builds(
    Policy,
    pinned=st.booleans(),
    priority=st.integers(-1, 1),
    quota_bytes=st.none() | st.integers(30_000, 150_000),
    ttl_s=st.none() | st.just(1e-9),
)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def content(number: int) -> bytes:
    return payload(number, size_of(number))


class StoreMachine(RuleBasedStateMachine):
    """`model` maps a chunk to its namespace while it may be there: what isn't protected may have yielded.

    `damaged` are chunks whose record was changed: they may be missed or refused, but not be wrong.
    """

    steps = 0

    @initialize()
    def make(self) -> None:
        self.undo = ExitStack()
        self.folder = self.undo.enter_context(small_store())
        patch = self.undo.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(core, "MAX_RESTING", MAX_RESTING)
        patch.setattr(logging.getLogger("torchcache_server"), "disabled", True)
        self.turn = 0
        self.kept: set[str] = set()
        self.policies: dict[str, Policy] = {}
        self.ordered: set[str] = set()
        self.model: dict[int, str] = {}
        self.damaged: set[int] = set()
        self.views: list[tuple[int, StoredChunk]] = []
        self.open()

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.views.clear()
        self.store.close()
        assert not descriptors(self.folder), "I5"
        self.undo.close()

    # ---- chunks in, chunks out ----

    @rule(name=NAMES, numbers=st.lists(NUMBERS, min_size=1, max_size=8), one_by_one=st.booleans())
    def put(self, name: str, numbers: list[int], one_by_one: bool) -> None:
        for batch in [[n] for n in numbers] if one_by_one else [numbers]:
            before, there = dict(self.model), self.contained()
            try:
                stored = self.store.put_many(name, [(chunk(n), n, content(n)) for n in batch])
            except OutOfSpace:
                assert self.contained() <= there
            else:
                for n, found in zip(batch, stored, strict=True):
                    self.judge(n, found)
                self.model.update(dict.fromkeys(set(batch) - there, name))
                self.damaged -= set(batch) - there
                self.mended_elsewhere(batch, name)
            self.only_those_yielded(before, name)

    def mended_elsewhere(self, numbers: list[int], name: str) -> None:
        """Notes those whose damage was noticed on the way, so that they were stored anew, under `name`."""
        core = self.store._core
        for n in self.damaged & set(numbers):
            place = core.index.get(chunk_key(chunk(n)))
            segment = core.space.segments.get(place.segment) if place else None
            if segment is not None and segment.header.namespace == name != self.model[n]:
                self.model[n] = name
                self.damaged.discard(n)

    @rule(name=NAMES, number=NUMBERS)
    def fill(self, name: str, number: int) -> None:
        """As a miss is filled: room first, then the bytes, if there is room."""
        if number in self.contained():
            return
        before = dict(self.model)
        try:
            promise = self.store.reserve(name, chunk(number), size_of(number))
        except OutOfSpace:
            pass
        else:
            self.store.put(name, chunk(number), number, content(number), promised=promise)
            promise.release()
            assert number in self.intact(), "what was promised was kept"
            self.model[number] = name
            self.damaged.discard(number)
        self.only_those_yielded(before, name)

    @rule(
        name=NAMES,
        numbers=st.lists(NUMBERS, min_size=2, max_size=8, unique=True),
        ending=st.sampled_from(["commit", "commit", "half", "abandon"]),
    )
    def write_by_client(self, name: str, numbers: list[int], ending: str) -> None:
        """A client is handed files; it writes all and commits, or half, or gives up."""
        before, there = dict(self.model), self.contained()
        rows = [(chunk(n), n, content(n)) for n in numbers]
        missing = set(numbers) - there
        try:
            got = self.store.prepare_write(name, [(id, n, len(data)) for id, n, data in rows], timeout_s=60)
            if got is None:
                return
            with opened(self.folder / str(self.turn), name, got) as fds:
                write_records(fds, got, rows if ending == "commit" else rows[: len(rows) // 2])
                assert self.contained() <= there, "nothing is visible before the commit"
                if ending == "abandon":
                    self.store.abandon_write(got.write_id)
                else:
                    self.store.commit_write(got.write_id)
        except (OutOfSpace, IntegrityError) as error:
            assert isinstance(error, OutOfSpace) or ending == "half"
            assert self.contained() <= there
        else:
            if ending != "abandon":
                self.model.update(dict.fromkeys(missing, name))
                self.damaged -= missing
                self.mended_elsewhere(numbers, name)
                assert missing <= self.intact()
        self.only_those_yielded(before, name)

    @rule(pick=NUMBERS)
    def look_up(self, pick: int) -> None:
        """I1, and what a reader does about damage."""
        number = self.there(pick)
        found = self.store.lookup(chunk(number))
        if found is not None and not self.judge(number, found):
            self.take_out(number)

    @rule(pick=NUMBERS, first=st.integers(0, 3), count=st.integers(1, 3))
    def read_range(self, pick: int, first: int, count: int) -> None:
        """I1: some blocks, verified by their checksums."""
        number = self.there(pick)
        found = self.store.lookup(chunk(number))
        if found is None:
            return
        part = slice(first * BLOCK_BYTES, (first + count) * BLOCK_BYTES)
        read = bytes(byte_view(found.payload)[part])
        if block_digests(memoryview(read)) == found.block_digests[8 * first : 8 * (first + count)]:
            assert read == content(number)[part]
        else:
            assert number in self.damaged

    @rule(pick=NUMBERS)
    def hold(self, pick: int) -> None:
        """A reader that takes its time: whatever becomes of the chunk, its bytes stay."""
        number = self.there(pick)
        found = self.store.lookup(chunk(number))
        if found is not None and number not in self.damaged:
            self.views.append((number, found))

    @rule()
    def let_go(self) -> None:
        self.views.clear()

    # ---- who stays and who goes ----

    @rule(name=NAMES, keep=st.booleans())
    def keep(self, name: str, keep: bool) -> None:
        self.store.keep(name, keep)
        (self.kept.add if keep else self.kept.discard)(name)

    @rule(name=NAMES, policy=POLICIES)
    def set_policy(self, name: str, policy: Policy) -> None:
        self.store.set_policy(name, policy)
        self.policies[name] = policy

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.store.pin(name, pinned)
        self.policies[name] = replace(self.policies.get(name, Policy()), pinned=pinned)

    @rule(name=NAMES, numbers=st.none() | st.lists(NUMBERS, max_size=30))
    def expect(self, name: str, numbers: list[int] | None) -> None:
        self.store.expect(name, None if numbers is None else map(chunk, numbers))
        (self.ordered.discard if numbers is None else self.ordered.add)(name)

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        if self.protected(name):
            with pytest.raises(ConfigurationError):
                self.store.evict(name)
        else:
            self.store.evict(name)
            self.forget(name)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        self.store.drop(name)
        self.kept.discard(name)
        self.ordered.discard(name)
        self.policies.pop(name, None)
        self.forget(name)

    @rule(name=NAMES)
    def sync(self, name: str) -> None:
        self.store.sync(name)

    # ---- damage and upkeep ----

    @rule(pick=NUMBERS, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def corrupt(self, pick: int, where: float, bit: int) -> None:
        """F5, F6: one bit of a record."""
        number = self.there(pick)
        place = self.store._core.index.get(chunk_key(chunk(number)))
        segment = self.store._core.space.segments.get(place.segment) if place else None
        record = segment.record(place.offset) if place and segment else None
        if place is None or segment is None or record is None:
            return
        at = place.offset + int(where * (record.length + record.payload_bytes))
        flip_bit(Path(segment.path), at, bit)
        self.damaged.add(number)
        self.views = [view for view in self.views if view[0] != number]

    @rule(pick=NUMBERS)
    def quarantine(self, pick: int) -> None:
        self.take_out(self.there(pick))

    def take_out(self, number: int) -> None:
        self.store.quarantine(chunk(number))
        self.model.pop(number, None)
        self.damaged.discard(number)
        assert not self.store.contains(chunk(number))

    @rule()
    def tidy(self) -> None:
        """What is too old goes, and nothing else."""
        before = self.intact()
        self.store.tidy()
        for n in before - self.intact():
            owner = self.model[n]
            assert not self.protected(owner) and self.policies[owner].ttl_s is not None

    @rule()
    def scrub(self) -> None:
        """A whole round finds all damage; what is kept stays."""
        while not self.store.scrub(30_000).finished:
            pass
        while not self.store.scrub(30_000).finished:
            pass
        for n in self.damaged & self.contained():
            assert self.model[n] in self.kept or n in self.intact()

    # ---- the end, and the beginning ----

    @rule()
    def restart(self) -> None:
        before = (self.intact(), self.namespaces())
        self.store.close()
        self.open()
        after = (self.intact(), self.namespaces())
        assert after == before, f"{before} became {after}"

    @rule()
    def crash(self) -> None:
        before = self.intact()
        self.turn += 1
        image = crash_image(self.folder / str(self.turn - 1), self.folder / str(self.turn))
        self.store.close()
        shutil.rmtree(self.folder / str(self.turn - 1))
        self.open()
        assert image.exists() and self.intact() == before

    def open(self) -> None:
        self.ordered.clear()
        self.views.clear()  # readers go with their server
        self.store = Store(
            self.folder / str(self.turn),
            capacity_bytes=CAPACITY,
            segment_bytes=SMALL_SEGMENT,
            min_free_bytes=0,
        )

    # ---- what is known ----

    def there(self, pick: int) -> int:
        """One of the chunks that are there, if there are any."""
        return sorted(self.model)[pick % len(self.model)] if self.model else pick

    def judge(self, number: int, found: StoredChunk) -> bool:
        """I1. Whether the chunk passes for good, and is."""
        if not found.is_intact():
            assert number in self.damaged
            return False
        assert bytes(found.payload) == content(number)
        assert found.object_size == number
        return True

    def namespaces(self) -> list[NamespaceUsage]:
        """Those that hold something, or of which something is to be remembered."""
        return [
            replace(n, bytes=0) for n in self.store.namespaces() if n.bytes or n.kept or n.policy != Policy()
        ]

    def contained(self) -> set[int]:
        return {n for n in ALL if self.store.contains(chunk(n))}

    def intact(self) -> set[int]:
        """What can be read from the disk, whatever is remembered."""
        self.store._core.known = {}
        found = {n: self.store.lookup(chunk(n)) for n in ALL}
        return {n for n, one in found.items() if one is not None and self.judge(n, one)}

    def policy(self, name: str) -> Policy:
        return self.policies.get(name, Policy())

    def protected(self, name: str) -> bool:
        return name in self.kept or self.policy(name).pinned

    def forget(self, name: str) -> None:
        for n in [n for n, owner in self.model.items() if owner == name]:
            assert not self.store.contains(chunk(n))
            del self.model[n]
            self.damaged.discard(n)

    def only_those_yielded(self, before: dict[int, str], taker: str) -> None:
        """To `taker`: nothing protected, nothing of a higher priority, nothing of its own unless it knows its order.

        What must be kept stands above all priorities.
        """
        for n in before.keys() - self.contained() - self.damaged:
            owner = before[n]
            assert not self.protected(owner), "I6"
            assert taker in self.kept or self.policy(owner).priority <= self.policy(taker).priority
            assert owner != taker or taker in self.ordered

    # ---- what must hold ----

    @invariant()
    def what_is_protected_is_there(self) -> None:
        """I6. What isn't may have yielded; the model forgets it then."""
        StoreMachine.steps += 1
        there = self.contained()
        for n in self.model.keys() - there:
            assert not self.protected(self.model[n]) or n in self.damaged
            del self.model[n]
            self.damaged.discard(n)
        assert there == self.model.keys()

    @invariant()
    def the_books_agree(self) -> None:
        """I5: with themselves, and with the file system."""
        usage, namespaces = self.store.usage(), self.store.namespaces()
        assert usage.used_bytes == sum(n.bytes for n in namespaces)
        assert usage.used_bytes + usage.spare_bytes <= CAPACITY
        assert usage.used_bytes == self.taken("segments/*/*")
        assert usage.spare_bytes == self.taken("spares/*")
        assert usage.chunks == sum(n.chunks for n in namespaces) == len(self.contained())
        assert {n.name for n in namespaces if n.kept} == self.kept
        assert all(n.policy == self.policy(n.name) for n in namespaces)
        space: Space = self.store._core.space
        assert space.promised_bytes == 0
        assert descriptors(self.folder) <= MAX_DESCRIPTORS

    def taken(self, files: str) -> int:
        return sum(512 * p.stat().st_blocks for p in (self.folder / str(self.turn)).glob(files))

    @precondition(lambda self: self.views)
    @invariant()
    def readers_see_what_they_came_for(self) -> None:
        """I1: also once the chunk's segment is gone, and its file another's."""
        for number, found in self.views:
            assert bytes(found.payload) == content(number)


@pytest.mark.parametrize("lives", [FEW, pytest.param(3000, marks=pytest.mark.long)])
def test_the_store_is_what_a_dict_would_be(lives: int) -> None:
    """`TORCHCACHE_MODEL_SEED` repeats a run."""
    chosen = int(_SEED) if _SEED else random.SystemRandom().randrange(1 << 32) if lives > FEW else 1
    print(f"TORCHCACHE_MODEL_SEED={chosen}")
    with proof("model", seed=chosen) as figures:
        StoreMachine.steps = 0
        run_state_machine_as_test(
            seed(chosen)(StoreMachine),
            settings=settings(max_examples=lives, stateful_step_count=40, deadline=None),
        )
        figures.update(lives=lives, steps=StoreMachine.steps)
