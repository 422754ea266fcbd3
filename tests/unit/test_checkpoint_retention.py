"""Which checkpoints stay: pure, over all small histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchcache.checkpoint.retention import Step, StepState, superfluous


def steps(**states: StepState) -> list[Step]:
    return [Step(step=int(name[1:]), uri=f"s3://b/{name}", state=state) for name, state in states.items()]


def gone(history: list[Step], *, keep_last: int | None, keep_every: int | None = None) -> list[int]:
    return [s.step for s in superfluous(history, keep_last=keep_last, keep_every=keep_every)]


def test_the_newest_stay_and_multiples_too() -> None:
    history = steps(s100="durable", s200="durable", s250="durable", s300="durable", s350="durable")
    assert gone(history, keep_last=2) == [100, 200, 250]
    assert gone(history, keep_last=2, keep_every=200) == [100, 250]
    assert gone(history, keep_last=None) == []
    assert gone(history, keep_last=9) == []


def test_the_newest_durable_one_stays_until_a_newer_one_is() -> None:
    history = steps(s1="durable", s2="durable", s3="cached", s4="failed", s5="replicated")
    assert gone(history, keep_last=1) == [1, 3, 4]
    assert gone([*history, *steps(s6="durable")], keep_last=1) == [1, 2, 3, 4, 5]


def test_what_is_needed_stays() -> None:
    history = steps(s1="durable", s2="durable", s3="broken", s4="durable")
    found = superfluous(history, keep_last=1, keep_every=None, needed=(2, 3, None))
    assert [s.step for s in found] == [1]


def test_what_cannot_be_restored_counts_for_nothing() -> None:
    history = steps(s1="durable", s2="broken", s3="durable", s4="broken", s5="saving")
    assert gone(history, keep_last=2) == [2]  # 4 and 5 may still become something
    assert gone(steps(s1="broken", s2="replicated"), keep_last=1) == []
    assert gone([], keep_last=1) == []


_STATES = st.sampled_from(["saving", "cached", "replicated", "durable", "failed", "broken"])


@given(
    st.lists(_STATES, max_size=8),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 4),
    st.randoms(),
)
def test_whatever_the_history(
    states: list[StepState], keep_last: int | None, keep_every: int | None, random: object
) -> None:
    history = [Step(step=n, uri=f"s3://b/step-{n}", state=state) for n, state in enumerate(states)]
    left = [s for s in history if s.step not in gone(history, keep_last=keep_last, keep_every=keep_every)]
    durable = [s.step for s in history if s.state == "durable"]
    assert not durable or durable[-1] in [s.step for s in left]
    restorable = [s.step for s in history if s.restorable]
    kept = [s.step for s in left if s.restorable]
    assert not restorable or restorable[-1] in kept
    assert kept[-(keep_last or 99) :] == restorable[-(keep_last or 99) :]
    if keep_last is None:
        assert kept == restorable
    else:
        others = [
            n for n in kept if n not in restorable[-keep_last:] and not (keep_every and n % keep_every == 0)
        ]
        assert others in ([], durable[-1:])
    assert [s for s in history if s.state == "saving"] == [s for s in left if s.state == "saving"]
    assert gone(left, keep_last=keep_last, keep_every=keep_every) == []  # once is enough
