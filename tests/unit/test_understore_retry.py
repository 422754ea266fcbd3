from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.understore.retry import Retrier, RetryBudget, RetryPolicy

from torchcache.errors import (
    DeadlineExceeded,
    IntegrityError,
    ObjectNotFound,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)


class Recorder:
    """A retrier that records its pauses instead of sleeping."""

    def __init__(self, policy: RetryPolicy | None = None, budget: RetryBudget | None = None) -> None:
        self.pauses: list[float] = []
        self.retries = 0
        self._retrier = Retrier(policy=policy, budget=budget, on_retry=self._count, sleep=self.pauses.append)

    def _count(self) -> None:
        self.retries += 1

    def run(self, *errors: TorchCacheError, timeout_s: float = 1000.0) -> str:
        """An attempt that meets `errors` one after the other, then succeeds."""
        left = iter(errors)

        def attempt() -> str:
            error = next(left, None)
            if error is not None:
                raise error
            return "done"

        return self._retrier.run(attempt, uri="s3://b/k", deadline=time.monotonic() + timeout_s)


def test_a_success_is_not_retried() -> None:
    recorder = Recorder()
    assert recorder.run() == "done"
    assert (recorder.retries, recorder.pauses) == (0, [])


@pytest.mark.parametrize("kind", [ServerUnavailable, Overloaded, IntegrityError])
def test_what_may_pass_is_retried(kind: Callable[[str], TorchCacheError]) -> None:
    recorder = Recorder()
    assert recorder.run(kind("x"), kind("y")) == "done"
    assert recorder.retries == 2


def test_what_is_final_is_not_retried() -> None:
    recorder = Recorder()
    with pytest.raises(ObjectNotFound, match=r"^gone$"):
        recorder.run(ObjectNotFound("gone"))
    assert recorder.retries == 0


def test_the_last_error_says_how_many_tries_failed() -> None:
    recorder = Recorder(RetryPolicy(tries=3))
    with pytest.raises(ServerUnavailable, match=r"^third; 3 tries failed") as caught:
        recorder.run(
            *(ServerUnavailable(text, object="k", server="s") for text in ("first", "second", "third"))
        )
    assert (caught.value.object, caught.value.server) == ("k", "s")
    assert len(recorder.pauses) == 2


def test_no_pause_outlasts_the_deadline() -> None:
    recorder = Recorder(RetryPolicy(tries=1000, first_s=10.0))
    errors = [ServerUnavailable("down")] * 1000
    with pytest.raises(DeadlineExceeded, match=r"for s3://b/k passed after \d+ failed tries, the last: down"):
        recorder.run(*errors, timeout_s=0.5)
    assert all(pause < 0.5 for pause in recorder.pauses)


@given(st.integers(1, 50), st.booleans())
def test_pauses_grow_to_a_bound(failures: int, overloaded: bool) -> None:
    policy = RetryPolicy()
    pause_s = policy.longest_pause_s(failures, overloaded=overloaded)
    assert 0 < pause_s <= policy.longest_pause_s(failures + 1, overloaded=overloaded) <= policy.longest_s
    assert pause_s <= policy.longest_pause_s(failures, overloaded=True)


def test_pauses_are_random_within_their_bound() -> None:
    policy = RetryPolicy(tries=7)
    recorder = Recorder(policy)
    recorder.run(*[Overloaded("busy")] * 6)
    bounds = [policy.longest_pause_s(failures, overloaded=True) for failures in range(1, 7)]
    assert all(0 <= pause <= bound for pause, bound in zip(recorder.pauses, bounds, strict=True))
    assert len(set(recorder.pauses)) == 6


def test_the_budget_is_refilled_by_successes_alone() -> None:
    recorder = Recorder(RetryPolicy(tries=100), RetryBudget(3))
    for expected in (3, 3):
        with pytest.raises(ServerUnavailable):
            recorder.run(*[ServerUnavailable("down")] * 100)
        assert recorder.retries == expected
    for _ in range(10):
        recorder.run()
    with pytest.raises(ServerUnavailable):
        recorder.run(*[ServerUnavailable("down")] * 100)
    assert recorder.retries == 4


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_error_is_its_own_cause(tokens: int) -> None:
    """Whoever follows a chain of causes would never come to its end."""
    recorder = Recorder(RetryPolicy(tries=4), RetryBudget(tokens))
    with pytest.raises(ServerUnavailable, match="down") as raised:
        recorder.run(*[ServerUnavailable("down")] * 4)
    error: BaseException | None = raised.value
    chain: list[BaseException] = []
    while error is not None:
        assert all(error is not one for one in chain)
        chain.append(error)
        error = error.__cause__ or error.__context__
