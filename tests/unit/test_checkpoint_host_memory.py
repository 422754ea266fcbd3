"""What saves and loads take beside the state is bounded, whatever has to be copied."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit import checkpoint_states
from tests.unit.checkpoint_pool import CheckpointPool
from torchcache.checkpoint import CacheStorageReader, CacheStorageWriter, writer
from torchcache.checkpoint.host_memory import Room, copied_bytes, to_host
from torchcache.checkpoint.loading import READ_BYTES, Load, run_loads
from torchcache.errors import ConfigurationError

URI = "s3://bucket/run/step-1"


def test_room_is_waited_for_and_the_largest_goes_alone() -> None:
    room = Room(100)
    room.take(60)
    room.take(40)
    came = threading.Event()

    def large() -> None:
        room.take(1000)
        came.set()

    thread = threading.Thread(target=large)
    thread.start()
    room.take(0)
    room.give_back(60)
    assert not came.is_set()
    room.give_back(40)
    assert came.wait(60)
    thread.join()
    room.give_back(1000)
    assert room.most_taken == 1000


def test_what_has_to_be_copied() -> None:
    tensor = torch.rand(6, 4)
    for plain in (tensor, tensor[2:4], torch.nn.Parameter(tensor), torch.empty(0, 3), torch.tensor(1.0)):
        assert copied_bytes(plain) == 0
    for copied in (
        tensor.t(),
        tensor[:, 1:],
        tensor[0].expand(3, 4),
        torch.rand(3, dtype=torch.cfloat).conj(),
    ):
        assert copied_bytes(copied) == copied.numel() * copied.dtype.itemsize
    assert copied_bytes(torch.rand(3, 3).to_sparse()) == 36


def test_what_lies_in_the_hosts_memory_stays_where_it_is() -> None:
    tensors = [torch.rand(3), torch.rand(4, 4).t()]
    assert all(a is b for a, b in zip(to_host(tensors), tensors, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_tensors_come_in_pinned_memory() -> None:
    chance = torch.Generator(device="cuda").manual_seed(0)
    tensors: list[torch.Tensor] = [torch.rand(1000, 300, device="cuda", generator=chance) for _ in range(8)]
    tensors += [tensors[0].t(), tensors[0][3:, 5:], torch.rand(7, device="cuda", dtype=torch.cfloat).conj()]
    tensors += [torch.tensor(3.0, device="cuda"), torch.empty(0, 4, device="cuda"), torch.rand(4)]
    found = to_host(tensors)
    assert all(torch.equal(a, b.cpu()) and a.is_cpu for a, b in zip(found, tensors, strict=True))
    assert all(a.is_pinned() and a.is_contiguous() for a in found[:-2])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_save_keeps_to_its_bound(monkeypatch: pytest.MonkeyPatch, compression: Any) -> None:
    pool, rooms = CheckpointPool(), []

    def room(size: int) -> Room:
        rooms.append(Room(size))
        return rooms[-1]

    monkeypatch.setattr(writer, "Room", room)
    state = {f"t{n:02d}": (torch.arange(40_000.0).view(200, 200) + n).t() for n in range(40)}
    limit = 2 * 80 * 1024 * 1024  # two of the smallest files there are
    to = checkpoint_states.writer(pool, URI, compression=compression, extra_memory_bytes=limit)
    dcp.save(state, storage_writer=to, no_dist=True)
    (only,) = rooms
    assert 0 < only.most_taken <= limit
    only.take(limit)  # all of it was given back
    found = {name: torch.zeros(200, 200) for name in state}
    dcp.load(found, storage_reader=checkpoint_states.reader(pool, URI), no_dist=True)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_objects_count_once_it_is_known_how_large_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with a tensor that is copied, and one object that is larger than all of the bound."""
    pool, room = CheckpointPool(), Room(400_000)
    monkeypatch.setattr(writer, "Room", lambda _: room)
    state: dict[str, Any] = {f"object-{n:02d}": "ab" * 10_000 + str(n) for n in range(40)}
    state |= {"object-20": "c" * 500_000, "tensor": torch.arange(10_000.0).view(100, 100).t()}
    to = checkpoint_states.writer(pool, URI, extra_memory_bytes=400_000)
    dcp.save(state, storage_writer=to, no_dist=True)
    assert 500_000 <= room.most_taken < 500_000 + 400_000
    room.take(400_000)  # all of it was given back
    names = [object.key.rpartition("/")[2] for _, object, _, _ in pool.writes]
    assert len(names) == len(set(names)) > 40 * 20_000 // 200_000
    found = {name: torch.zeros(100, 100) if name == "tensor" else None for name in state}
    dcp.load(found, storage_reader=checkpoint_states.reader(pool, URI), no_dist=True)
    assert torch.equal(found.pop("tensor"), state.pop("tensor"))
    assert found == state


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_room_is_taken_for_objects_and_for_what_is_made_of_them(
    monkeypatch: pytest.MonkeyPatch, compression: Any
) -> None:
    """What was taken by guess, before they are pickled, is never less than what they turn out to need."""
    corrected: list[tuple[int, int]] = []

    class Corrected(Room):
        def correct(self, guessed_bytes: int, bytes: int) -> None:
            corrected.append((guessed_bytes, bytes))
            super().correct(guessed_bytes, bytes)

    monkeypatch.setattr(writer, "Room", Corrected)
    state = {f"object-{n:02d}": "ab" * 5_000 + str(n) for n in range(60)}
    to = checkpoint_states.writer(CheckpointPool(), URI, extra_memory_bytes=400_000, compression=compression)
    dcp.save(state, storage_writer=to, no_dist=True)
    assert len(corrected) > 2
    one = 2 * 12_000  # that began within what was guessed, and ends beyond
    assert all(bytes <= guessed_bytes + one for guessed_bytes, bytes in corrected)


class CountedLoads:
    """Loads that say of themselves to take so many bytes each; `most` is what there was of them at a time."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._there = 0
        self.most = 0
        self.finished = 0

    def __iter__(self) -> Iterator[Load]:
        for size in self._sizes:
            self._count(size)
            yield self._made(size)

    def _made(self, size: int) -> Load:
        made = CountedLoad(self, size)
        weakref.finalize(made, self._count, -size)
        return made

    def _count(self, size: int) -> None:
        self._there += size
        self.most = max(self.most, self._there)


class CountedLoad(Load):
    def __init__(self, loads: CountedLoads, size: int) -> None:
        self._loads = loads
        self.fetches = []
        self.extra_bytes = size

    def finish(self) -> None:
        self._loads.finished += 1


LARGE = 16 * READ_BYTES


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([LARGE] * 6, LARGE),
        ([READ_BYTES] * 20, 2 * READ_BYTES),
        ([READ_BYTES // 4] * 80, 2 * READ_BYTES),
        ([LARGE, READ_BYTES // 4] * 6, 2 * READ_BYTES + LARGE),
    ],
    ids=["large", "as large as a read", "small", "large and small"],
)
def test_a_load_keeps_to_its_bound(sizes: list[int], most: int) -> None:
    """What is larger than all of the bound is there alone: the one before it is forgotten first."""
    loads = CountedLoads(sizes)
    run_loads(loads, None, extra_memory_bytes=2 * READ_BYTES)
    assert loads.finished == len(sizes)
    assert loads.most <= most


@pytest.mark.parametrize("wrong", [0, -1, "512MB", None, 1.5])
def test_what_is_no_bound(wrong: Any) -> None:
    for made in (CacheStorageWriter, CacheStorageReader):
        with pytest.raises(ConfigurationError, match="extra_memory_bytes"):
            made(URI, extra_memory_bytes=wrong)
