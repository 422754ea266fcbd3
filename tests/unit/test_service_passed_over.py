"""What a server keeps for people to see: whom its clients pass over, and how long calls take."""

from __future__ import annotations

import pytest
from torchcache_server.service.latencies import BOUNDS_S, Latencies
from torchcache_server.service.passed_over import KEPT_S, MAX_CLIENTS, PassedOver

SLOW = ("a", "slow")
GONE = ("b", "unreachable")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_clients_are_counted_by_server_and_reason_and_what_one_said_last_counts() -> None:
    seen = PassedOver(Clock())
    seen.heard("one", [SLOW, GONE])
    seen.heard("two", [SLOW])
    seen.heard("three", [])
    assert seen.counts() == {SLOW: 2, GONE: 1}
    seen.heard("one", [GONE])
    seen.heard("two", [])
    assert seen.counts() == {GONE: 1}


def test_who_says_nothing_more_is_forgotten() -> None:
    clock = Clock()
    seen = PassedOver(clock)
    seen.heard("one", [SLOW])
    clock.now_s = KEPT_S
    seen.heard("two", [SLOW])
    assert seen.counts() == {SLOW: 2}
    clock.now_s += 0.1
    assert seen.counts() == {SLOW: 1}


def test_of_too_many_clients_the_first_are_forgotten() -> None:
    seen = PassedOver(Clock())
    for number in range(MAX_CLIENTS + 10):
        seen.heard(str(number), [SLOW])
    assert seen.counts() == {SLOW: MAX_CLIENTS}


def test_calls_are_counted_by_how_long_they_took() -> None:
    latencies = Latencies(["read"])
    assert latencies.read()["read"].counts == [0] * (len(BOUNDS_S) + 1)
    for took_s in (0.0, BOUNDS_S[0], BOUNDS_S[1], 1e9):
        latencies.add("read", took_s)
    found = latencies.read()["read"]
    assert (found.counts[0], found.counts[1], found.counts[-1]) == (2, 1, 1)
    assert found.total_s == pytest.approx(1e9)
    with pytest.raises(ZeroDivisionError), latencies.timed("other"):
        raise ZeroDivisionError
    assert sum(latencies.read()["other"].counts) == 1, "a call that fails is one, too"
