"""Orders that readers told: what is needed when, where reading is, and what strays, restarts and late ones change."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from torchcache_server.store.epochs import Epoch
from torchcache_server.store.eviction import NEVER
from torchcache_server.store.foresight import Foresight

from torchcache.marks import marks
from torchcache.model import ChunkId, ObjectId
from torchcache.records import chunk_key


def key(number: int) -> bytes:
    return chunk_key(ChunkId(ObjectId("s3", str(number), "v"), number % 3))


def epoch(order: list[int], *, running: bool = True) -> Epoch:
    """Of chunks by number, one a sample."""
    return Epoch(
        marks([key(n) for n in order]),
        np.arange(len(order), dtype=np.uint32),
        length=len(order),
        running=running,
    )


def shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def foreseen(*epochs: Epoch, clock: Clock | None = None) -> Foresight:
    foresight = Foresight(clock or Clock())
    for number, one in enumerate(epochs):
        foresight.tell("rank0", number, one, 60.0)
    return foresight


def test_marks_tell_chunks_apart() -> None:
    found = marks([chunk_key(ChunkId(ObjectId("s3", str(n), "v"), i)) for n in range(200) for i in range(20)])
    assert len(set(found.tolist())) == 4000
    assert marks([]).tolist() == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 40))
def test_next_uses_are_those_of_a_list(order: list[int], read: int) -> None:
    """Chunks that come several times too."""
    foresight = foreseen(epoch(order))
    for number in order[:read]:
        foresight.used(key(number))
    standing = foresight.standing("rank0")
    assert standing is not None and 0 <= standing.position <= min(read, len(order))
    for number in range(10):
        rest = [at for at, n in enumerate(order) if n == number and at >= read]
        expected = rest[0] - (standing.position - 1) if rest else NEVER
        assert foresight.next_use(key(number)) == expected


def test_the_next_epoch_is_behind_what_is_left_of_this_one() -> None:
    first, second = shuffled(1000, 1), shuffled(1000, 2)
    foresight = foreseen(epoch(first), epoch(second, running=False))
    for number in first[:400]:
        foresight.used(key(number))
    assert foresight.next_use(key(first[400])) == 1
    assert foresight.next_use(key(first[999])) == 600
    assert foresight.next_use(key(first[7])) == 600 + second.index(first[7])
    assert foresight.next_use(key(12345)) == NEVER


def test_epochs_follow_each_other_as_they_are_read() -> None:
    orders = [shuffled(500, seed) for seed in range(3)]
    foresight = foreseen(epoch(orders[0]), epoch(orders[1], running=False))
    for number, order in enumerate(orders[:2]):
        for at, chunk in enumerate(order):
            foresight.used(key(chunk))
            if at == 250:
                standing = foresight.standing("rank0")
                assert standing is not None
                assert (standing.epoch, standing.position) == (number, 251)
        foresight.tell("rank0", number + 2, epoch(orders[2], running=False), 60.0)
    assert foresight.standing("rank0").epoch == 1  # type: ignore[union-attr]


def test_a_read_that_was_counted_twice_moves_nothing() -> None:
    first = shuffled(1000, 1)
    foresight = foreseen(epoch(first), epoch(shuffled(1000, 2), running=False))
    for number in (*first[:100], first[990], first[995], *first[:50]):
        foresight.used(key(number))
    standing = foresight.standing("rank0")
    assert standing is not None
    assert (standing.epoch, standing.position) == (0, 100)


def test_an_epoch_that_wasnt_said_to_run_begins_with_its_first_reads() -> None:
    """Another one runs, that nobody told."""
    told, running = shuffled(2000, 1), shuffled(2000, 2)
    foresight = foreseen(epoch(told, running=False))
    for number in running:
        foresight.used(key(number))
    assert foresight.standing("rank0").position == -1  # type: ignore[union-attr]
    for number in told[:100]:
        foresight.used(key(number))
    assert foresight.standing("rank0").position > 50  # type: ignore[union-attr]


def test_what_was_never_read_is_not_waited_for_for_ever() -> None:
    """As after a resume in the middle."""
    order = shuffled(5000, 1)
    foresight = foreseen(epoch(order))
    for number in order[3000:3100]:
        foresight.used(key(number))
    assert foresight.next_use(key(order[10])) == NEVER
    assert foresight.next_use(key(order[3100])) == 1


def test_an_order_expires_unless_it_is_renewed() -> None:
    clock = Clock()
    foresight = foreseen(epoch([1, 2, 3]), clock=clock)
    clock.now_s += 50
    assert foresight.renew("rank0", 60.0)
    clock.now_s += 50
    foresight.expire()
    assert foresight
    clock.now_s += 50
    foresight.expire()
    assert not foresight
    assert not foresight.renew("rank0", 60.0)
    assert foresight.next_use(key(1)) == NEVER


def test_the_nearest_of_several_readers_counts() -> None:
    foresight = foreseen(epoch([1, 2, 3, 4]))
    foresight.tell("rank1", 0, epoch([9, 4, 1]), 60.0)
    assert [foresight.next_use(key(n)) for n in (4, 3, 9)] == [2, 3, 1]
    foresight.forget("rank1")
    assert foresight.next_use(key(4)) == 4
    assert foresight.chunks == 4


@pytest.mark.parametrize("count", [1, 2, 7])
def test_small_epochs_move_on_too(count: int) -> None:
    foresight = foreseen(epoch(list(range(count))))
    for number in range(count):
        foresight.used_marks(marks([key(number)]))
    standing = foresight.standing("rank0")
    assert standing is not None
    assert standing.position == count
