"""collate, and batches of workers in shared memory: equal to torch's, never written over, and used again."""

from __future__ import annotations

import errno
import gc
import os
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import torchcache as tc
from torchcache.data import buffer_pool, sharing
from torchcache.data.batching import LEAST_BYTES
from torchcache.data.memory import SharedMemory, lease_at
from torchcache.errors import TorchCacheError

MIB = 1024 * 1024
Point = namedtuple("Point", ["x", "y"])


def large(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(0, 100, (64, 33), generator=torch.Generator().manual_seed(seed)).to(dtype)


BATCHES: dict[str, Callable[[int], Any]] = {
    "tensor": large,
    "float64": lambda i: large(i, torch.float64),
    "bfloat16": lambda i: large(i, torch.bfloat16),
    "bool": lambda i: large(i) > 50,
    "complex": lambda i: large(i, torch.complex64),
    "conjugated": lambda i: (large(i, torch.complex64) * 1j).conj(),
    "transposed": lambda i: large(i).T,
    "scalar": torch.tensor,
    "empty": lambda i: torch.empty(0),
    "array": lambda i: large(i).numpy(),
    "pair": lambda i: (large(i), i),
    "dict": lambda i: {"image": large(i), "label": i, "name": str(i), "box": [float(i), 2.0]},
    "namedtuple": lambda i: Point(large(i), {"deep": [large(i + 1)]}),
    "bytes": lambda i: bytes([i]),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", BATCHES)
def test_it_equals_torchs(kind: str) -> None:
    for count in (1, 40):
        batch = [BATCHES[kind](i) for i in range(count)]
        assert same(tc.collate(batch), default_collate(batch))


def test_it_fails_as_torchs() -> None:
    unequal = [torch.zeros(100_000), torch.zeros(100_001)]
    for function in (tc.collate, default_collate):
        with pytest.raises(RuntimeError, match="equal size"):
            function(unequal)


def rows(pool: tc.BufferPool, count: int = 8, size: int = LEAST_BYTES) -> list[torch.Tensor]:
    return [*pool.take(count * size).view(count, size).unbind()]


def test_samples_that_lie_end_to_end_are_one_tensor_already() -> None:
    batch = rows(tc.BufferPool(8 * MIB))
    joined = tc.collate(batch)
    assert joined.shape == (8, LEAST_BYTES)
    assert joined.data_ptr() == batch[0].data_ptr()
    floats = [row.view(torch.float32).view(-1, 16) for row in batch]
    assert tc.collate(floats).shape == (8, LEAST_BYTES // 64, 16)
    assert tc.collate(floats).data_ptr() == batch[0].data_ptr()


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 4], [0, 0, 1], [0, 1, 1]])
def test_others_are_copied(order: list[int]) -> None:
    batch = rows(tc.BufferPool(8 * MIB))
    for number, row in enumerate(batch):
        row.fill_(number)
    picked = [batch[i] for i in order]
    stacked = tc.collate(picked)
    assert stacked[:, 0].tolist() == order
    assert stacked.data_ptr() not in [row.data_ptr() for row in batch]


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.T,
    "of another type": lambda tensor: tensor.view(torch.int32),
    "negated when read": torch._neg_view,
    "with a gradient": lambda tensor: tensor.requires_grad_(),
    "of another shape": lambda tensor: tensor.view(-1, 2 * tensor.shape[1]),
}


@pytest.mark.parametrize("place", [0, 1, 7])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_one_among_those_that_lie_end_to_end(kind: str, place: int) -> None:
    """Its memory alone doesn't say what it is."""
    batch = [
        row.view(torch.float32).view(256, 256) for row in rows(tc.BufferPool(8 * MIB), size=256 * 256 * 4)
    ]
    for number, row in enumerate(batch):
        row.copy_(torch.arange(256 * 256).view(256, 256) + number)
    batch[place] = ODD[kind](batch[place])
    try:
        expected = default_collate(batch)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            tc.collate(batch)
    else:
        found = tc.collate(batch)
        assert found.requires_grad == expected.requires_grad
        assert same(found, expected)


@pytest.mark.parametrize(
    "make", [torch.from_numpy, lambda array: torch.from_numpy(array).view(torch.float32)]
)
def test_tensors_of_storages_of_their_own_over_one_buffer(make: Callable[[Any], torch.Tensor]) -> None:
    """As transform=torch.from_numpy makes them of arrays."""
    batch = rows(tc.BufferPool(8 * MIB))
    for number, row in enumerate(batch):
        row.fill_(number)
    tensors = [make(row.numpy()) for row in batch]
    assert same(tc.collate(tensors), default_collate(tensors))


def test_a_tensor_of_the_users_own_is_copied() -> None:
    """Else a training loop that works in place would change the dataset."""
    dataset = torch.zeros(8, LEAST_BYTES, dtype=torch.uint8)
    tc.collate([*dataset.unbind()]).fill_(1)
    assert not dataset.any()


# ---- shared memory, both sides in one process ----


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[tc.BufferPool]:
    """A pool as a worker has it."""
    monkeypatch.setattr(buffer_pool, "get_worker_info", object)
    yield tc.BufferPool(4 * MIB)


def sent(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the process that trains gets it."""
    received = pickle.loads(bytes(ForkingPickler.dumps(tensor)))
    assert type(received) is torch.Tensor
    return received


def test_what_is_sent_is_the_same_memory(pool: tc.BufferPool) -> None:
    batch = tc.collate(rows(pool))
    batch.fill_(5)
    received = sent(batch)
    assert received.data_ptr() != batch.data_ptr()
    received[3] = 6
    assert batch[:, 0].tolist() == [5, 5, 5, 6, 5, 5, 5, 5]


def test_a_part_in_another_type_arrives_as_it_is(pool: tc.BufferPool) -> None:
    numbers = pool.take(MIB).view(torch.int64).view(-1, 64)
    numbers.copy_(torch.arange(MIB // 8).view(-1, 64))
    part = sharing.shareable(numbers[100:200, 3:9])
    assert same(sent(part), numbers[100:200, 3:9].clone())


def test_memory_that_is_away_is_not_handed_out(pool: tc.BufferPool) -> None:
    batch = tc.collate(rows(pool))
    where = batch.data_ptr()
    batch.fill_(1)
    message = bytes(ForkingPickler.dumps(batch))
    del batch
    others = [pool.take(MIB) for _ in range(3)]  # sent, not yet received
    assert where not in [other.data_ptr() for other in others]
    kept = pickle.loads(message)[2:4].numpy()
    others = [pool.take(MIB).fill_(9) for _ in range(3)]  # received, and a part of it held
    assert where not in [other.data_ptr() for other in others]
    assert (kept == 1).all()
    del kept, others
    assert where in [pool.take(MIB).data_ptr() for _ in range(1)]


def test_the_bound_holds_whatever_is_away(pool: tc.BufferPool) -> None:
    received = []
    for number in range(10):
        batch = tc.collate(rows(pool))
        batch.fill_(number)
        received.append(sent(batch))
        del batch
        assert pool.lent_bytes + pool.free_bytes <= 4 * MIB
    assert [batch[7, 9].item() for batch in received] == list(range(10))
    received.clear()
    buffers = [pool.take(MIB) for _ in range(4)]
    leases = [lease_at(buffer.data_ptr()) for buffer in buffers]
    assert all(lease is not None and isinstance(lease.memory, SharedMemory) for lease in leases)


def test_the_same_sent_twice_is_two(pool: tc.BufferPool) -> None:
    """One of them is torch's copy: the header can tell of one receiver."""
    batch = tc.collate(rows(pool))
    batch.fill_(3)
    first, second = sent(batch), sent(batch)
    first.fill_(4)
    assert (second == 3).all()


def test_without_descriptors_batches_go_torchs_way(
    pool: tc.BufferPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    batch = tc.collate(rows(pool))
    batch.fill_(5)
    assert type(batch) is torch.Tensor
    assert pool.lent_bytes == batch.nbytes
    assert same(sent(batch), batch)
    assert pool.lent_bytes == 0  # torch moved it into shared memory of its own


def test_what_was_received_before_a_fork_never_goes_back(pool: tc.BufferPool) -> None:
    """The child may go on reading it, so the worker must not write into it."""
    batch = tc.collate(rows(pool))
    memory = lease_at(batch.untyped_storage().data_ptr())
    assert memory is not None
    memory_of_batch = memory.memory
    received = [sent(batch)]
    del batch, memory
    pid = os.fork()
    if pid == 0:
        received.clear()  # nor may the child give back what its parent still reads
        gc.collect()
        os._exit(0 if memory_of_batch.away else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert memory_of_batch.away
    received.clear()
    assert memory_of_batch.away


def test_a_worker_that_forks_begins_anew(pool: tc.BufferPool) -> None:
    free = pool.take(MIB).data_ptr()
    held = pool.take(2 * MIB).fill_(1)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (held.numpy() == 1).all() and pool.lent_bytes == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (pool.lent_bytes, pool.free_bytes) == (0, 0)
    assert free
    assert (held == 1).all()


def test_a_batch_of_a_worker_that_ended_says_so(pool: tc.BufferPool) -> None:
    batch = tc.collate(rows(pool))
    lease = lease_at(batch.untyped_storage().data_ptr())
    assert lease is not None
    memory = lease.memory
    assert isinstance(memory, SharedMemory)
    message = bytes(ForkingPickler.dumps(batch))
    other = bytes(ForkingPickler.dumps(tc.collate(rows(pool))))
    os.close(memory.descriptor)
    memory.descriptor = -1
    with pytest.raises(TorchCacheError, match="ended before its batch was taken"):
        pickle.loads(message)
    assert pickle.loads(other).shape == batch.shape


def test_other_memory_than_was_sent_is_refused(pool: tc.BufferPool) -> None:
    batch = tc.collate(rows(pool))
    lease = lease_at(batch.untyped_storage().data_ptr())
    assert lease is not None
    assert isinstance(lease.memory, SharedMemory)
    lease.memory.token = bytes(16)  # as if another process had its number and its descriptor by now
    with pytest.raises(TorchCacheError, match="ended before its batch was taken"):
        sent(batch)


# ---- real workers ----


class Numbered(Dataset[Any]):
    """Sample i is full of i; its size makes a batch of 4 a megabyte."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return {"image": torch.full((256, 256), index, dtype=torch.int32), "label": index}


@pytest.mark.parametrize(("method", "persistent"), [("fork", True), ("fork", False), ("spawn", True)])
def test_batches_of_workers_stay_what_they_are(method: str, persistent: bool) -> None:
    """Kept, dropped and changed in place while the workers go on."""
    loader = DataLoader(
        Numbered(),
        batch_size=4,
        num_workers=2,
        collate_fn=tc.collate,
        multiprocessing_context=method,
        persistent_workers=persistent,
    )
    for _ in range(2):
        kept, at = [], 0
        for batch in loader:
            expected = list(range(at, at + 4))
            at += 4
            assert type(batch["image"]) is torch.Tensor
            assert batch["label"].tolist() == expected
            assert batch["image"].shape == (4, 256, 256)
            assert (batch["image"] == torch.tensor(expected).view(4, 1, 1)).all()
            if at % 12 == 0:
                kept.append((batch["image"][2], expected[2]))
            else:
                batch["image"].fill_(-1)
        assert at == 96
        assert all((image == value).all() for image, value in kept)


def test_a_loaders_batches_go_back_to_its_workers() -> None:
    """As many pieces of memory as are in flight, and not one a batch."""
    loader = DataLoader(Numbered(), batch_size=4, num_workers=1, collate_fn=tc.collate)
    before, pieces = mapped_pieces(), set()
    for batch in loader:
        pieces |= mapped_pieces() - before
        del batch
    assert 1 <= len(pieces) <= 8  # of 24
    assert not sharing._received._in_use


def mapped_pieces() -> set[str]:
    """Inodes of the pieces of memory that are mapped here."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:torchcache" in line}


@pytest.mark.forks
def test_the_memory_of_workers_that_are_gone_goes_with_the_next_ones() -> None:
    before = mapped_pieces()
    for batch in DataLoader(Numbered(), batch_size=4, num_workers=1, collate_fn=tc.collate):
        del batch
    first = mapped_pieces() - before
    assert first
    for batch in DataLoader(Numbered(), batch_size=4, num_workers=1, collate_fn=tc.collate):
        assert not mapped_pieces() & first
        del batch


def test_mappings_are_kept_up_to_a_bound(pool: tc.BufferPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_KEPT_BYTES", 3 * MIB)
    seen = []
    for _ in range(6):
        batch = tc.collate(rows(tc.BufferPool(4 * MIB)))
        sent(batch)
        seen.append(sum(place.map_bytes for place in sharing._received._idle))
    assert max(seen) <= 3 * MIB
    assert seen[-1] > MIB
    kept = [*sharing._received._idle]
    assert torch.equal(sent(batch), batch)
    assert [*sharing._received._idle] == kept  # mapped once, used twice


@pytest.mark.forks
def test_arrays_of_workers_arrive_as_tensors() -> None:
    class Arrays(Numbered):
        def __getitem__(self, index: int) -> Any:
            return np.full(100_000, index, dtype=np.int64)

    loader = DataLoader(
        Arrays(), batch_size=4, num_workers=1, collate_fn=tc.collate, multiprocessing_context="fork"
    )
    assert [batch[:, 5].tolist() for batch in loader] == [list(range(i, i + 4)) for i in range(0, 96, 4)]
