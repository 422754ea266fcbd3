"""BufferPool: no memory that anything refers to is ever handed out again, and what nothing refers to is."""

from __future__ import annotations

import gc
import os
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.collected import until_collected
from torchcache.data.buffer_pool import BufferPool, room_for
from torchcache.errors import ConfigurationError

MIB = 1024 * 1024

HOLDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda t: t,
    "row": lambda t: t[len(t) // 2 :],
    "viewed": lambda t: t[: len(t) // 4 * 4].view(torch.int32),
    "array": lambda t: t.numpy(),
    "slice of an array": lambda t: t.numpy()[1:],
    "memoryview": lambda t: t.numpy().data,
    "slice of a memoryview": lambda t: t.numpy().data[len(t) // 2 :],
    "tensor over a memoryview": lambda t: torch.frombuffer(t.numpy().data, dtype=torch.uint8),
    "array over a memoryview": lambda t: np.frombuffer(t.numpy().data, np.uint8)[:1],
    "dlpack": torch.utils.dlpack.to_dlpack,  # type: ignore[attr-defined]
}
"""Ways to keep a buffer alive without keeping the tensor."""


def address(buffer: torch.Tensor) -> int:
    return buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize("way", HOLDS)
def test_a_buffer_comes_back_with_the_last_that_refers_to_it(way: str) -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(1000)
    where, held = address(buffer), HOLDS[way](buffer)
    del buffer
    assert (pool.lent_bytes, pool.free_bytes) == (4096, 0)
    other = pool.take(1000)
    assert address(other) != where
    del held
    assert (pool.lent_bytes, pool.free_bytes) == (4096, 4096)
    assert address(pool.take(1000)) == where


def test_a_cycle_is_no_leak() -> None:
    pool = BufferPool(MIB)
    held: list[Any] = [pool.take(10)]
    held.append(held)
    del held
    assert until_collected(lambda: pool.lent_bytes == 0)


class Lending(RuleBasedStateMachine):
    """Buffers are taken, kept by this or that view of them, and let go, at random; each is filled with its number."""

    CAPACITY = 64 * 1024

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(self.CAPACITY)
        self.live: dict[int, Any] = {}
        self.spans: dict[int, tuple[int, int]] = {}
        self.count = 0

    buffers = Bundle("buffers")

    @rule(target=buffers, size=st.integers(1, 40_000), way=st.sampled_from(sorted(HOLDS)))
    def take(self, size: int, way: str) -> int:
        self.count += 1
        buffer = self.pool.take(size)
        assert len(buffer) == size
        for start, end in self.spans.values():
            assert address(buffer) >= end or address(buffer) + size <= start
        buffer.fill_(self.count % 251)
        self.live[self.count] = HOLDS[way](buffer)
        self.spans[self.count] = (address(buffer), address(buffer) + size)
        return self.count

    @rule(number=consumes(buffers))
    def let_go(self, number: int) -> None:
        del self.live[number], self.spans[number]

    @invariant()
    def nobody_wrote_into_what_is_held(self) -> None:
        for number, held in self.live.items():
            if isinstance(held, memoryview):
                assert set(held) <= {number % 251}
            elif isinstance(held, torch.Tensor | np.ndarray):
                as_array = np.asarray(held).view(np.uint8)
                assert (as_array == number % 251).all()

    @invariant()
    def the_bound_holds(self) -> None:
        assert self.pool.lent_bytes + self.pool.free_bytes <= self.CAPACITY


TestLending = Lending.TestCase
TestLending.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_never_share_a_buffer() -> None:
    pool, errors = BufferPool(MIB), []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(300):
            buffer = pool.take(chance.randrange(1, 50_000))
            buffer.fill_(number)
            kept = buffer[len(buffer) // 2 :].numpy()
            del buffer
            if not (kept == number).all():
                errors.append(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert not errors
    assert pool.lent_bytes == 0


def test_leases_may_end_while_the_lock_is_held() -> None:
    """The garbage collector runs where it likes, in `take` too."""
    pool = BufferPool(MIB)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            cycle: list[Any] = [pool.take(5000)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*before)
    del cycle
    assert until_collected(lambda: pool.lent_bytes == 0)


def test_beyond_the_capacity_memory_is_fresh_and_not_kept() -> None:
    pool = BufferPool(MIB)
    first = [pool.take(MIB // 4) for _ in range(4)]
    more = pool.take(MIB)
    assert len({address(b) for b in [*first, more]}) == 5
    assert pool.lent_bytes == MIB
    del more
    assert pool.free_bytes == 0
    first.clear()
    assert (pool.lent_bytes, pool.free_bytes) == (0, MIB)


def test_what_lay_unused_longest_makes_room() -> None:
    pool = BufferPool(MIB)
    old, young = pool.take(MIB // 2), pool.take(MIB // 4)
    where = address(young)
    del old
    del young
    large = pool.take(3 * MIB // 4)
    assert (pool.lent_bytes, pool.free_bytes) == (3 * MIB // 4, MIB // 4)
    assert address(pool.take(MIB // 4)) == where
    assert len(large) == 3 * MIB // 4


def test_a_large_piece_does_not_serve_a_small_buffer() -> None:
    pool = BufferPool(MIB)
    pool.take(MIB // 2)
    small = pool.take(5000)
    assert (pool.lent_bytes, pool.free_bytes) == (room_for(5000), MIB // 2)
    assert len(small) == 5000


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 114_660, 29_352_960, 146_600_628, 2**33 + 1])
def test_pieces_are_at_most_an_eighth_larger(size: int) -> None:
    assert size <= room_for(size) <= max(4096, size + size // 8 + 1) or size < 32_768
    assert room_for(size) % 4096 == 0
    assert room_for(room_for(size)) == room_for(size)


def test_nothing_is_a_buffer_too() -> None:
    pool = BufferPool(MIB)
    assert pool.take(0).shape == (0,)
    assert pool.lent_bytes == 0


def test_it_pickles_as_its_arguments_and_starts_empty() -> None:
    pool = BufferPool("2MiB")
    kept = pool.take(100_000)
    other = pickle.loads(pickle.dumps(pool))
    assert (other.capacity_bytes, other.pin_memory, other.lent_bytes) == (2 * MIB, False, 0)
    assert repr(other) == repr(pool) == "BufferPool(2097152)"
    assert len(kept) == 100_000


def in_a_child(check: Callable[[], bool]) -> bool:
    """What `check` says in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_while_buffers_are_out() -> None:
    """Both sides keep what was out as it was, and neither hands it out again while it is held."""
    pool = BufferPool(MIB)
    held = [pool.take(10_000).fill_(7)]
    pool.take(10_000)  # free again
    where = address(held[0])

    def child() -> bool:
        new = [pool.take(10_000).fill_(9) for _ in range(5)]
        return bool((held[0] == 7).all()) and where not in map(address, new) and pool.lent_bytes == 5 * 12_288

    assert in_a_child(child)
    held[0].fill_(8)
    assert in_a_child(lambda: bool((held[0] == 8).all()))
    held.clear()
    assert pool.free_bytes == 2 * room_for(10_000)


def test_a_fork_while_another_thread_takes() -> None:
    """The child must not wait for a lock that a thread of its parent held."""
    pool, stop = BufferPool(MIB), threading.Event()

    def work() -> None:
        while not stop.is_set():
            pool.take(5000)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(in_a_child(lambda: len(pool.take(5000)) == 5000) for _ in range(20))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("capacity", [0, -1, "much", True])
def test_a_bad_capacity_is_refused(capacity: Any) -> None:
    with pytest.raises(ConfigurationError):
        BufferPool(capacity)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without CUDA says")
def test_pinned_memory_needs_cuda() -> None:
    with pytest.raises(ConfigurationError, match="needs CUDA"):
        BufferPool(pin_memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_is_pinned() -> None:
    buffer = BufferPool(pin_memory=True).take(1000)
    assert buffer.is_pinned()
    assert buffer[10:].numpy().flags.writeable
