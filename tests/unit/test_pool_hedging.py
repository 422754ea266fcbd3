"""Whose bytes a call takes that was asked of other servers too."""

from __future__ import annotations

from collections.abc import Sequence

from torchcache.errors import NotResident, ObjectNotFound, ServerUnavailable
from torchcache.lanes.base import Outcome, ReadOptions
from torchcache.lanes.watch import Watch
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool.hedging import Attempt, Call
from torchcache.pool.routing import Part

GONE = ServerUnavailable("gone")


def data(text: str) -> memoryview:
    return memoryview(text.encode())


def attempt(server: str, places: Sequence[int], into: Sequence[memoryview | None], watch: Watch) -> Attempt:
    extents = [Extent(ObjectInfo(ObjectId("s3", f"key/{place}", "1"), 5)) for place in places]
    return Attempt(server, places, extents, into, ReadOptions(), watch)


class World:
    """A call of three extents to server "a", of which "b" is asked for two, and "c" for one."""

    def __init__(self) -> None:
        self.buffers = [bytearray(b"-" * 7) for _ in range(3)]
        into: list[memoryview | None] = [memoryview(buffer) for buffer in self.buffers]
        into[2] = None
        self.watch = Watch()
        first = attempt("a", range(3), into, self.watch)
        parts = [
            Part(place, extent, target, ("a", "b", "c"))
            for place, (extent, target) in enumerate(zip(first.extents, into, strict=True))
        ]
        self.b = attempt("b", [0, 2], [None] * 2, Watch())
        self.c = attempt("c", [1], [None], Watch())
        self.call = Call(parts, first, hedges=[self.b, self.c])

    def outcomes(self) -> list[Outcome] | None:
        return self.call.outcomes


def test_the_first_wins_if_it_is_whole() -> None:
    world = World()
    world.b.outcomes = [data("b zero"[:5]), data("b two")]
    assert not world.call.settle()
    assert world.outcomes() is None
    world.call.first.outcomes = [data("right")] * 3
    assert not world.call.settle()
    assert world.outcomes() == [data("right")] * 3
    assert [bytes(buffer) for buffer in world.buffers] == [b"-" * 7] * 3


def test_the_hedges_win_once_all_are_whole_and_the_first_is_ended_before_its_buffers_are_written() -> None:
    world = World()
    world.b.outcomes = [data("zero."), data("two..")]
    world.call.settle()
    assert not world.watch.ended
    assert world.buffers[0] == b"-" * 7
    world.c.outcomes = [data("one..")]
    assert world.call.settle()
    assert world.watch.ended
    assert world.outcomes() == [data("zero."), data("one.."), data("two..")]
    assert [bytes(buffer) for buffer in world.buffers] == [b"zero.--", b"one..--", b"-" * 7]
    found = world.outcomes()
    assert found is not None
    assert isinstance(found[0], memoryview)
    assert found[0].obj is world.buffers[0], "the filled part of the buffer"


def test_what_one_lacks_the_others_give() -> None:
    world = World()
    world.call.first.outcomes = [data("mine."), GONE, GONE]
    world.call.settle()
    assert world.outcomes() is None, "the others are waited for"
    world.b.outcomes = [data("zero."), NotResident("not here")]
    world.c.outcomes = [data("one..")]
    world.call.settle()
    assert world.outcomes() == [data("mine."), data("one.."), GONE]


def test_what_is_certain_needs_no_second_opinion() -> None:
    world = World()
    absent = ObjectNotFound("no")
    world.call.first.outcomes = [data("mine."), absent, data("mine.")]
    world.call.settle()
    assert world.outcomes() == [data("mine."), absent, data("mine.")]


def test_hedges_that_fail_leave_it_to_the_first() -> None:
    world = World()
    world.b.outcomes = [GONE, GONE]
    world.c.outcomes = [data("one..")]
    assert not world.call.settle()
    assert world.outcomes() is None
    assert not world.watch.ended
    world.call.first.outcomes = [data("mine.")] * 3
    world.call.settle()
    assert world.outcomes() == [data("mine.")] * 3
