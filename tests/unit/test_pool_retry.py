"""When a call is made again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import DeadlineExceeded, ObjectNotFound, Overloaded, ServerUnavailable, TorchCacheError
from torchcache.pool.retry import Budget, Retry, RetryPolicy, hedge_budget, retry_budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def retry(clock: Clock, *, lasts_s: float = 60.0, budget: Budget | None = None) -> Retry:
    return Retry(
        budget or retry_budget(), clock.now + lasts_s, sleep=clock.sleep, clock=clock, chance=lambda: 0.0
    )


def tries(one: Retry, error: TorchCacheError) -> int:
    count = 1
    while one.again(error):
        count += 1
    return count


@pytest.mark.parametrize("kind", [ServerUnavailable, DeadlineExceeded])
def test_transient_errors_are_tried_again_a_bounded_number_of_times(kind: type[TorchCacheError]) -> None:
    clock = Clock()
    assert tries(retry(clock), kind("later")) == RetryPolicy().attempts
    assert 2.0 < clock.now - 100.0 < 10.0  # long enough for a server to restart


def test_a_busy_server_is_asked_until_the_deadline() -> None:
    """More workers than a server has streams wait for their turn, however slow its source: none fails."""
    clock, budget = Clock(), Budget(most=3, earned=0.5)
    assert tries(retry(clock, budget=budget), Overloaded("64 streams are open")) > RetryPolicy().attempts
    assert 155.0 < clock.now < 160.0
    assert budget.spend()  # no outage: nothing was spent


def test_a_busy_server_is_not_asked_before_the_time_it_names() -> None:
    clock = Clock()
    one = retry(clock)
    assert one.again(Overloaded("busy", retry_after_s=1.5))
    assert clock.now == 101.5
    assert one.again(Overloaded("busy", retry_after_s=0.0))
    assert clock.now == 101.5 + RetryPolicy().pause_s(2, 0.0)
    assert not one.again(Overloaded("busy", retry_after_s=60.0)), "that would be after the deadline"
    assert clock.now < 110.0


def test_those_who_were_told_the_same_time_come_one_after_the_other() -> None:
    clock = Clock()
    late = Retry(retry_budget(), clock.now + 60, sleep=clock.sleep, clock=clock, chance=lambda: 0.5)
    assert late.again(Overloaded("busy", retry_after_s=2.0))
    assert clock.now == 102.5


def test_final_errors_are_not() -> None:
    assert tries(retry(Clock()), ObjectNotFound("never")) == 1


def test_no_pause_goes_beyond_the_deadline() -> None:
    clock = Clock()
    tries(retry(clock, lasts_s=0.5), ServerUnavailable("down"))
    assert clock.now <= 100.5


@given(st.integers(1, 30), st.floats(0, 0.999))
def test_pauses_grow_to_a_bound(count: int, chance: float) -> None:
    policy = RetryPolicy()
    pause = policy.pause_s(count, chance)
    assert policy.first_s / 2 <= pause <= policy.most_s
    assert pause <= policy.pause_s(count, 0.0) <= policy.pause_s(count + 1, 0.0)


def test_an_outage_spends_the_budget_and_good_calls_earn_it_back() -> None:
    budget = Budget(most=3, earned=0.5)
    clock = Clock()
    assert tries(retry(clock, budget=budget), ServerUnavailable("down")) == 4
    assert tries(retry(clock, budget=budget), ServerUnavailable("down")) == 1
    budget.earn()
    budget.earn()
    assert tries(retry(clock, budget=budget), ServerUnavailable("down")) == 2


def test_a_twentieth_of_what_is_read_may_be_asked_for_twice() -> None:
    budget = hedge_budget()
    twice = sum(100 for _ in range(1000) if not budget.earn(100) and budget.spend(100))
    assert 5000 <= twice <= 5000 + 64 + 100


def test_hedges_that_come_too_late_become_few_and_many_again_when_they_help() -> None:
    """As where all servers are short of the same processor: a second one is no faster."""
    budget = hedge_budget()

    def twice(told: Callable[[], None]) -> int:
        count = 0
        for _ in range(1000):
            budget.earn(100)
            if budget.spend(100):
                count += 100
                told()
        return count

    assert twice(budget.in_vain) <= 64 + 100 + 100_000 * 0.05 / 3
    assert twice(budget.in_vain) <= 100 + 100_000 * 0.05 / 4
    assert twice(budget.helped) >= 100_000 * 0.05 / 2
    assert 4900 <= twice(budget.helped) <= 5100


@pytest.mark.parametrize(("late", "most"), [(0, 11), (9, 42)])
def test_after_large_calls_hedging_comes_back(late: int, most: int) -> None:
    """However many came too late: within so many calls of 512 extents another second is tried."""
    budget = hedge_budget()
    for _ in range(late):
        budget.in_vain()
    assert budget.spend(512)
    calls = 0
    while not budget.spend(512):
        budget.earn(512)
        calls += 1
    assert 1 < calls <= most
