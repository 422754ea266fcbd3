"""placement.py: one order for all clients, shares by weight, and few moves when members or weights change."""

from __future__ import annotations

import uuid
from collections import Counter
from fractions import Fraction
from typing import Final

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.placement_hashes import Hashing, owners
from torchcache.model import SAMPLES, STRIPE_BYTES, ObjectId
from torchcache.placement import Placement, placement_key

members = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)
several = members.filter(lambda m: len(m) > 1)
weight = st.floats(1e-3, 1e15)

OBJECT: Final = ObjectId("s3", "bucket/key", "etag")
KEYS: Final = [placement_key(OBJECT, number * STRIPE_BYTES) for number in range(4000)]


@given(st.binary(max_size=24), members, st.randoms(), st.data())
def test_the_order_does_not_depend_on_how_members_are_listed(key, servers, random, data) -> None:
    weights = data.draw(st.none() | st.fixed_dictionaries(dict.fromkeys(servers, weight)))
    shuffled = list(servers)
    random.shuffle(shuffled)
    order = Placement(servers, weights).order(key)
    assert order == Placement(shuffled, weights).order(key)
    assert sorted(order) == sorted(servers)
    assert Placement(servers, weights).owner(key) == order[0]


@given(st.binary(max_size=24), members, weight)
def test_equal_weights_are_no_weights(key, servers, each) -> None:
    """Stores of before there were weights keep what they own: the score is the hash of the id, seeded by the key's."""
    seed = xxhash.xxh3_64_intdigest(key)
    expected = sorted(servers, key=lambda id_: (-xxhash.xxh3_64_intdigest(id_.encode(), seed), id_))
    assert Placement(servers).order(key) == expected
    assert Placement(servers, dict.fromkeys(servers, each)).order(key) == expected
    assert Placement(servers, dict.fromkeys(servers, each)) == Placement(reversed(servers))


@given(st.binary(max_size=24), several, st.data())
def test_a_server_that_leaves_moves_only_its_own(key, servers, data) -> None:
    weights = data.draw(st.none() | st.fixed_dictionaries(dict.fromkeys(servers, weight)))
    gone = data.draw(st.sampled_from(servers))
    before = Placement(servers, weights).order(key)
    after = Placement([s for s in servers if s != gone], weights).order(key)
    assert after == [s for s in before if s != gone]


@given(st.binary(max_size=24), several, st.data())
def test_a_server_of_more_weight_only_gains(key, servers, data) -> None:
    weights = data.draw(st.fixed_dictionaries(dict.fromkeys(servers, weight)))
    grown = data.draw(st.sampled_from(servers))
    before = Placement(servers, weights)
    after = Placement(servers, weights | {grown: 2 * weights[grown]})
    assert after.owner(key) in (before.owner(key), grown)
    rest = [s for s in before.order(key) if s != grown]
    assert [s for s in after.order(key) if s != grown] == rest


def test_stripes_spread_evenly() -> None:
    placement = Placement(f"server-{i}" for i in range(4))
    owned = Counter(map(placement.owner, KEYS))
    assert all(800 < owned[s] < 1200 for s in placement.members)


def test_stripes_spread_by_weight() -> None:
    weights = {"a": 100e9, "b": 200e9, "c": 500e9}
    placement = Placement(weights, weights)
    owned = Counter(map(placement.owner, KEYS))
    assert placement.shares() == [Fraction(1, 8), Fraction(1, 4), Fraction(5, 8)]
    for server, share in zip(placement.members, placement.shares(), strict=True):
        assert abs(owned[server] - share * len(KEYS)) < 0.03 * len(KEYS)


def test_while_a_server_tells_no_weight_all_are_alike() -> None:
    assert Placement("abc", {"a": 1.0, "b": 9.0}) == Placement("abc", {"a": 1.0, "b": 9.0, "c": 0.0})
    assert Placement("abc", {"a": 1.0, "b": 9.0}) == Placement("abc")
    assert Placement("abc", {"a": 1.0, "b": 9.0, "c": 1.0}) != Placement("abc")


def test_the_simulation_places_as_the_product_does() -> None:
    ids = [uuid.uuid4().hex for _ in range(30)]
    weights = [1.0, 2.5, 7.0] * 10
    seeds = np.fromiter(map(xxhash.xxh3_64_intdigest, KEYS), np.uint64)
    id_ = ids[0].encode()
    hashes = Hashing(seeds).hashes(id_)
    assert hashes.tolist() == [xxhash.xxh3_64_intdigest(id_, int(seed)) for seed in seeds]
    encoded = [id_.encode() for id_ in ids]
    even, uneven = Placement(ids), Placement(ids, dict(zip(ids, weights, strict=True)))
    assert [ids[at] for at in owners(seeds, encoded)] == [even.owner(key) for key in KEYS]
    assert [ids[at] for at in owners(seeds, encoded, weights)] == [uneven.owner(key) for key in KEYS]
    with pytest.raises(ValueError, match="an id of 3 bytes"):
        Hashing(seeds).hashes(b"abc")


def test_what_is_placed_together() -> None:
    stripe = ObjectId("s3", "bucket/key", "etag")
    assert placement_key(stripe, 0) == placement_key(stripe, STRIPE_BYTES - 1)
    assert placement_key(stripe, 0) != placement_key(stripe, STRIPE_BYTES)
    sample = ObjectId(SAMPLES, "name/1", "0")
    assert placement_key(sample, 0) == placement_key(sample, 10 * STRIPE_BYTES)
    shard = ObjectId("s3", "bucket/run/step-1/__0_0.distcp", "save:1")
    other = ObjectId("s3", "bucket/run/step-1/__1_0.distcp", "save:1")
    assert placement_key(shard, 0) == placement_key(other, 10 * STRIPE_BYTES)
