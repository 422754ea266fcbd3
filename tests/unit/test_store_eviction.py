"""Who yields: properties of the choice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.store.eviction import Candidate, choose_victims

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
