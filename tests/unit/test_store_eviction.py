"""Who yields: properties of the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.store import Store
from torchcache_server.store.eviction import NEVER, Candidate, Held, choose_victims, choose_yielding
from torchcache_server.store.ordering import ReadingOrder

from benchmarks import eviction as simulation
from tests.proofs import proof
from tests.unit.store_parts import MIB, chunk
from torchcache.errors import OutOfSpace

NAMES = ("a", "b", "c", "d")


@st.composite
def stores(draw: st.DrawFn) -> list[Candidate]:
    last_used = {name: draw(st.integers(0, 9)) for name in NAMES}
    count = draw(st.integers(0, 12))
    out = []
    for number in range(count):
        name = draw(st.sampled_from(NAMES))
        out.append(Candidate(number, name, draw(st.integers(1, 100)), last_used[name], draw(st.booleans())))
    return out


NEEDS = st.integers(1, 400)


@given(stores(), NEEDS)
def test_never_ones_own_nor_what_is_protected(candidates: list[Candidate], need: int) -> None:
    victims = choose_victims(candidates, namespace="a", need_bytes=need) or []
    chosen = [c for c in candidates if c.segment in victims]
    assert not any(c.protected or c.namespace == "a" for c in chosen)
    assert len(set(victims)) == len(victims)


@given(stores(), NEEDS)
def test_enough_and_not_more(candidates: list[Candidate], need: int) -> None:
    sizes = {c.segment: c.bytes for c in candidates}
    victims = choose_victims(candidates, namespace="a", need_bytes=need)
    if victims is None:
        able = [c.bytes for c in candidates if not c.protected and c.namespace != "a"]
        assert sum(able) < need
    else:
        assert sum(sizes[v] for v in victims) >= need
        assert sum(sizes[v] for v in victims[:-1]) < need


@given(stores(), NEEDS)
def test_the_least_recently_used_go_first(candidates: list[Candidate], need: int) -> None:
    victims = choose_victims(candidates, namespace="a", need_bytes=need) or []
    chosen = [c for c in candidates if c.segment in victims]
    spared = [c for c in candidates if c.segment not in victims and not c.protected and c.namespace != "a"]
    assert all(c.last_used <= s.last_used for c in chosen for s in spared)


@given(stores(), st.integers(-5, 0))
def test_nothing_goes_for_nothing(candidates: list[Candidate], need: int) -> None:
    assert choose_victims(candidates, namespace="a", need_bytes=need) == []


def test_for_nobody_all_may_go() -> None:
    only = [Candidate(1, "a", 10, 0, protected=False)]
    assert choose_victims(only, namespace="a", need_bytes=5) is None
    assert choose_victims(only, namespace=None, need_bytes=5) == [1]


@given(stores(), NEEDS, st.integers(-3, 3))
def test_nothing_of_a_higher_priority_yields(candidates: list[Candidate], need: int, priority: int) -> None:
    ranked = [
        Candidate(c.segment, c.namespace, c.bytes, c.last_used, c.protected, c.segment % 7 - 3)
        for c in candidates
    ]
    victims = choose_victims(ranked, namespace="a", need_bytes=need, priority=priority) or []
    chosen = [c for c in ranked if c.segment in victims]
    assert all(c.priority <= priority for c in chosen)
    assert [c.priority for c in sorted(chosen, key=lambda c: victims.index(c.segment))] == sorted(
        c.priority for c in chosen
    )


# ---- with a known order ----


RECORDS = st.lists(st.integers(0, 1000), min_size=1, max_size=8)


@given(st.lists(RECORDS, min_size=1, max_size=6), st.integers(0, 1000), st.integers(1, 60))
def test_what_stays_is_needed_sooner_than_what_goes(uses: list[list[int]], next_use: int, slack: int) -> None:
    segments = {
        n: [Held(b"%d/%d" % (n, i), 10, use) for i, use in enumerate(uses_of)]
        for n, uses_of in enumerate(uses)
    }
    chosen = choose_yielding(
        segments,
        tails={n: 10 * len(r) for n, r in segments.items()},
        now=0,
        next_use=next_use,
        slack_bytes=slack,
    )
    if chosen is None:
        return
    goes = [held.next_use for held in segments[chosen.segment] if held.key not in chosen.stay]
    stays = [held.next_use for held in segments[chosen.segment] if held.key in chosen.stay]
    assert goes
    assert not stays or max(stays) < min(goes)
    assert next_use < min(goes), "a chunk that is needed later than all that goes should pass through"


def test_what_is_never_needed_again_never_comes_in() -> None:
    records = {1: [Held(b"a", 10, 5), Held(b"b", 10, NEVER)]}
    assert choose_yielding(records, tails={1: 20}, now=0, next_use=NEVER, slack_bytes=10) is None
    chosen = choose_yielding(records, tails={1: 20}, now=0, next_use=7, slack_bytes=10)
    assert chosen == (1, frozenset({b"a"}))


def test_an_order_knows_what_comes_next() -> None:
    order = ReadingOrder([b"a", b"b", b"a", b"c"])
    assert [order.next_use(key) for key in (b"a", b"b", b"c", b"d")] == [0, 1, 3, NEVER]
    order.used(b"a")
    order.used(b"d")
    assert (order.next_use(b"a"), order.now) == (2, 0)
    order.used(b"c")
    order.used(b"a")
    assert (order.next_use(b"a"), order.next_use(b"c"), order.next_use(b"b"), order.now) == (
        NEVER,
        NEVER,
        1,
        3,
    )


@pytest.mark.parametrize("reading", simulation.READINGS)
def test_belady_is_the_optimum_of_the_simulation(reading: str) -> None:
    """So that what is measured against it means something."""
    accesses = simulation.READINGS[reading](200, 4)
    best = simulation.belady(accesses, 100).hits
    for policy in (simulation.lru, simulation.resident_stays, simulation.farthest_yields):
        assert policy(accesses, 100).hits <= best


def test_half_a_dataset_cached_hits_half_and_with_the_order_what_belady_hits() -> None:
    """Shuffled epochs, the first of which hits nothing and isn't counted."""
    with proof("eviction") as figures:
        chunks, epochs = 1000, 5
        accesses = simulation.shuffled_epochs(chunks, epochs + 1)
        best = simulation.belady(accesses, chunks // 2).hits
        counted = chunks * epochs
        lru, stays, ordered = (
            policy(accesses, chunks // 2).hits
            for policy in (simulation.lru, simulation.resident_stays, simulation.farthest_yields)
        )
        assert stays >= 0.5 * counted
        assert ordered >= 0.95 * best
        figures.update(
            chunks=chunks,
            epochs=epochs,
            lru=round(lru / counted, 3),
            ours=round(stays / counted, 3),
            ours_ordered=round(ordered / counted, 3),
            belady=round(best / counted, 3),
        )


@pytest.mark.parametrize("ordered", [False, True])
def test_the_store_itself_hits_so_much(tmp_path: Path, ordered: bool) -> None:
    """Read through as a server does, chunks of 100 kB in a store that holds half of them."""
    chunks, epochs, size = 600, 4, 100_000
    accesses = simulation.shuffled_epochs(chunks, epochs + 1)
    record_bytes, segments = 100_224, 6
    capacity = chunks // 2 * record_bytes + segments * 8192
    store = Store(tmp_path, capacity_bytes=capacity, segment_bytes=5 * MIB, min_free_bytes=0)
    if ordered:
        store.expect("a", [chunk(n) for n in accesses])
    payload = bytes(size)
    hits = 0
    for n in accesses:
        if store.lookup(chunk(n)) is not None:
            hits += 1
            continue
        try:
            promised = store.reserve("a", chunk(n), size)
        except OutOfSpace:
            continue
        try:
            store.put("a", chunk(n), size, payload, promised=promised)
        except OutOfSpace:
            pass
        finally:
            promised.release()
    best = simulation.belady(accesses, chunks // 2).hits
    assert store.usage().chunks <= chunks // 2
    assert hits >= 0.95 * best if ordered else hits >= 0.5 * chunks * epochs
    store.close()
