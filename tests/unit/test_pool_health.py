"""How a process judges the servers of a pool, by sequences with a clock of their own."""

from __future__ import annotations

import random

import pytest

from torchcache.pool.health import (
    ENOUGH,
    HEDGE_LEAST_S,
    HEDGE_TIMES,
    LATE_IN_A_ROW,
    MOST_S,
    PAUSE_S,
    SILENT_S,
    UNKNOWN_S,
    Health,
    far_slower,
)

SIZE = 100_000
SERVERS = ["a", "b", "c", "d"]


class World:
    """A pool of servers, each of which takes `takes_s` for a read."""

    def __init__(self, servers: list[str] = SERVERS, *, chance: float = 0.5) -> None:
        self.now = 1000.0
        self.said: list[tuple[str, str]] = []
        self.takes_s = dict.fromkeys(servers, 0.001)
        self.health = Health(
            lambda server, words: self.said.append((server, words)),
            clock=lambda: self.now,
            chance=lambda: chance,
        )
        self.health.members(servers)

    def read(self, server: str, size: int = SIZE) -> None:
        began = self.now
        self.now += self.takes_s[server] * size / SIZE
        self.health.timed(server, size, began)

    def rounds(self, count: int) -> None:
        for _ in range(count):
            for server in self.takes_s:
                if not self.health.is_out(server):
                    self.read(server)

    def probe(self, server: str) -> float:
        """Waits until it may be tried, and tries it; how long that was."""
        start = self.now
        while not self.health.take_probe(server):
            self.now += 0.1
        waited = self.now - start
        self.now += self.takes_s[server]
        self.health.probed(server, SIZE, self.takes_s[server])
        return waited

    def out(self) -> list[str]:
        return sorted(self.health.out())


def test_one_that_takes_a_hundred_times_as_long_is_out_and_comes_back() -> None:
    world = World()
    world.rounds(20)
    assert world.out() == []
    world.takes_s["b"] = 0.1
    world.rounds(LATE_IN_A_ROW - 1)
    assert world.out() == []
    world.rounds(1)
    assert world.out() == ["b"]
    assert "100 times" in world.health.out()["b"]
    world.probe("b")
    assert world.out() == ["b"]
    world.takes_s["b"] = 0.001
    world.probe("b")
    assert world.out() == []
    assert world.said[-1] == ("b", "")
    world.rounds(50)
    assert world.out() == []


def test_large_reads_are_no_slow_ones() -> None:
    """Each is compared with what the others take for as much."""
    world = World()
    for _ in range(20):
        for server in SERVERS:
            world.read(server, size=SIZE if server == "a" else 100 * SIZE)
    world.read("a", size=100 * SIZE)
    assert world.out() == []
    world.takes_s["a"] = 0.1
    for _ in range(LATE_IN_A_ROW):
        world.read("a", size=100 * SIZE)
    assert world.out() == ["a"], "its large ones are compared with the large ones of others"


def test_a_hiccup_that_delays_many_calls_is_one() -> None:
    world = World()
    world.rounds(20)
    began = world.now
    world.now += 0.5
    for _ in range(16):
        world.health.timed("a", SIZE, began)
    assert world.out() == []
    world.rounds(1)
    for _ in range(LATE_IN_A_ROW - 1):
        world.health.beaten("a", SIZE, world.now - 0.5)
    assert world.out() == [], "what began before the last was known to be late counts with it"


def test_what_is_late_now_and_then_is_not_out() -> None:
    world = World()
    chance = random.Random(7)
    for _ in range(500):
        world.takes_s["c"] = 0.2 if chance.random() < 0.3 and world.takes_s["c"] < 0.2 else 0.001
        world.rounds(1)
    assert world.out() == []


def test_what_is_beaten_again_and_again_is_slow() -> None:
    world = World()
    world.rounds(20)
    for _ in range(LATE_IN_A_ROW):
        began = world.now
        world.now += HEDGE_LEAST_S
        world.health.beaten("d", SIZE, began)
    assert world.out() == ["d"]


@pytest.mark.parametrize("takes_s", [0.002, 0.012, 0.03, 0.1])
def test_a_slow_one_is_out_as_soon_where_all_take_long(takes_s: float) -> None:
    """F16: its call ends with the other server's answer, at less than ten times what the others take."""
    world = World()
    world.takes_s = dict.fromkeys(SERVERS, takes_s)
    world.rounds(20)
    for reads in range(LATE_IN_A_ROW):
        assert world.out() == [], f"after {reads} reads"
        began = world.now
        world.now += world.health.hedge_s("a", SIZE) + takes_s
        world.health.beaten("a", SIZE, began)
    assert world.out() == ["a"]
    assert "more than" in world.health.out()["a"], "its call was ended: nobody knows"


def test_who_is_beaten_by_those_that_are_no_faster_stays() -> None:
    """They are asked late, since they take long: one that is usually quick isn't far slower than they are."""
    world = World()
    world.takes_s = {"a": 0.001, **dict.fromkeys(SERVERS[1:], 0.1)}
    world.rounds(20)
    for _ in range(2 * LATE_IN_A_ROW):
        began = world.now
        world.now += HEDGE_LEAST_S + 0.1
        world.health.beaten("a", SIZE, began)
    assert world.out() == []


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_no_majority_is_out(count: int, most: int) -> None:
    servers = [f"server-{n}" for n in range(count)]
    world = World(servers)
    world.rounds(20)
    assert [world.health.silent(server) for server in servers] == [n < most for n in range(count)]
    slow = World(servers)
    slow.rounds(20)
    for server in servers[1:]:
        slow.takes_s[server] = 0.5
    slow.rounds(40)
    assert len(slow.out()) <= most


def test_who_is_dead_is_out_even_if_all_are() -> None:
    world = World(["a", "b"])
    world.health.failed("a")
    world.health.failed("b")
    assert world.out() == ["a", "b"]
    world.now += 2 * PAUSE_S
    world.health.answered("b")
    assert world.out() == ["a"]


def test_a_word_ends_being_unreachable_after_a_while_and_nothing_else() -> None:
    world = World()
    world.rounds(20)
    assert world.health.silent("a")
    world.health.failed("b")
    world.health.answered("b")
    assert world.out() == ["a", "b"], "at another port, or late"
    world.now += 2 * PAUSE_S
    assert world.health.take_probe("b")
    world.health.answered("b")
    assert world.out() == ["a", "b"], "the probe says"
    world.health.probed("b", SIZE, None)
    world.now += 4 * PAUSE_S
    world.health.answered("a")
    world.health.answered("b")
    assert world.out() == ["a"]
    world.probe("a")
    assert world.out() == []


def test_a_read_that_began_afterwards_ends_being_unreachable_at_once() -> None:
    """As of the only server there is, which was started again."""
    world = World()
    began = world.now
    world.now += 1
    world.health.failed("a")
    world.health.answered("a", began)
    assert world.out() == ["a"]
    world.now += 0.1
    world.health.answered("a", world.now)
    assert world.out() == []


def test_one_that_stays_out_is_tried_ever_more_rarely_and_by_one_at_a_time() -> None:
    world = World()
    world.rounds(20)
    world.health.failed("a")
    world.health.failed("a")  # by a call that was under way too
    waits = []
    for _ in range(6):
        start = world.now
        while not world.health.take_probe("a"):
            world.now += 0.1
        assert not world.health.take_probe("a")
        waits.append(world.now - start)
        world.health.probed("a", SIZE, None)
    assert waits == pytest.approx([PAUSE_S * 2**n for n in range(4)] + [MOST_S] * 2, abs=0.3)


def test_clients_do_not_come_back_all_at_once() -> None:
    waits = []
    for chance in (0.0, 0.999):
        world = World(chance=chance)
        world.health.failed("a")
        waits.append(world.probe("a"))
    assert waits == pytest.approx([0.75 * PAUSE_S, 1.25 * PAUSE_S], abs=0.2)


def test_one_that_goes_out_again_soon_is_left_alone_for_longer() -> None:
    world = World()
    world.rounds(20)
    waits = []
    for _ in range(3):
        world.health.failed("a")
        waits.append(world.probe("a"))
        assert world.out() == []
    assert waits == pytest.approx([PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S], abs=0.2)
    world.now += MOST_S
    world.health.failed("a")
    assert world.probe("a") == pytest.approx(PAUSE_S, abs=0.2)


def test_when_to_ask_twice() -> None:
    world = World()
    world.takes_s["b"] = 0.05
    assert world.health.hedge_s("a", SIZE) == UNKNOWN_S, "nothing is known"
    for _ in range(ENOUGH):
        world.read("b")
    assert world.health.hedge_s("a", SIZE) == HEDGE_LEAST_S, "what others take is better than nothing"
    assert world.health.hedge_s("a", 1000 * SIZE) == UNKNOWN_S
    for n in range(40):
        world.takes_s["a"] = 0.4 if n % 10 == 0 else 0.2
        world.read("a")
        world.health.members(SERVERS)  # looked for again: what is known stays
    assert world.out() == []
    assert world.health.hedge_s("a", SIZE) == pytest.approx(HEDGE_TIMES * 0.4)
    assert world.health.hedge_s("b", SIZE) == HEDGE_LEAST_S
    assert world.health.silence_s("b", SIZE) == SILENT_S
    assert world.health.silence_s("a", 1000 * SIZE) == 2 * UNKNOWN_S


def test_times_for_the_same_that_are_far_slower() -> None:
    assert far_slower({"a": 0.001, "b": 0.1, "c": 0.001}) == pytest.approx({"b": 100})
    assert far_slower({"a": 0.001, "b": 0.02, "c": 0.001}) == {}, "a scheduler's mood"
    assert far_slower({"a": 0.1, "b": 0.1, "c": 0.001}) == {}, "not the majority"
    assert far_slower({"a": 5.0}) == {}


def test_who_leaves_the_pool_is_forgotten() -> None:
    world = World()
    world.health.failed("a")
    world.health.members(["b", "c"])
    assert world.out() == []
    assert not world.health.is_out("a")
    assert not world.health.anyone_out
