"""placement.py: one order for all clients, balance, and few moves when members change."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from torchcache.model import SAMPLES, STRIPE_BYTES, ObjectId
from torchcache.placement import placement_key, rendezvous_order

members = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)


@given(st.binary(max_size=24), members, st.randoms())
def test_the_order_does_not_depend_on_how_members_are_listed(key, servers, random) -> None:
    shuffled = list(servers)
    random.shuffle(shuffled)
    assert rendezvous_order(key, servers) == rendezvous_order(key, shuffled)
    assert sorted(rendezvous_order(key, servers)) == sorted(servers)


@given(st.binary(max_size=24), members.filter(lambda m: len(m) > 1), st.data())
def test_a_server_that_leaves_moves_only_its_own(key, servers, data) -> None:
    gone = data.draw(st.sampled_from(servers))
    before = rendezvous_order(key, servers)
    after = rendezvous_order(key, [s for s in servers if s != gone])
    assert after == [s for s in before if s != gone]


def test_stripes_spread_evenly() -> None:
    servers = [f"server-{i}" for i in range(4)]
    object_id = ObjectId("s3", "bucket/key", "etag")
    owners = Counter(
        rendezvous_order(placement_key(object_id, i * STRIPE_BYTES), servers)[0] for i in range(4000)
    )
    assert all(800 < owners[s] < 1200 for s in servers)


def test_what_is_placed_together() -> None:
    stripe = ObjectId("s3", "bucket/key", "etag")
    assert placement_key(stripe, 0) == placement_key(stripe, STRIPE_BYTES - 1)
    assert placement_key(stripe, 0) != placement_key(stripe, STRIPE_BYTES)
    sample = ObjectId(SAMPLES, "name/1", "0")
    assert placement_key(sample, 0) == placement_key(sample, 10 * STRIPE_BYTES)
    shard = ObjectId("s3", "bucket/run/step-1/__0_0.distcp", "save:1")
    other = ObjectId("s3", "bucket/run/step-1/__1_0.distcp", "save:1")
    assert placement_key(shard, 0) == placement_key(other, 10 * STRIPE_BYTES)
