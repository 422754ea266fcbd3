"""What an epoch's plan asks for again: what is coming, what there is no room for, what may have to yield to that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchcache.data.chunk_table import ChunkTable
from torchcache.data.epoch_plan import HELD_UP, LATER, LATER_MOST, WINDOW, EpochPlan, Share
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement
from torchcache.pool.orders import OrderKey, StagedAhead, State

COUNT = 1000


def extents(indices: Sequence[int]) -> list[Extent]:
    return [Extent(ObjectInfo(ObjectId("s3", f"{index:04d}", "1"), 10), 0, 10) for index in indices]


def plan_of_one_server(epoch: int = 0, *, running: bool = True) -> tuple[EpochPlan, Share]:
    table = ChunkTable(extents, COUNT, Placement(["server"]))
    plan = EpochPlan(OrderKey("s3", "order"), epoch, np.arange(COUNT), table, ["server"], running=running)
    return plan, plan.shares[0]


def answer(plan: EpochPlan, share: Share, states: Sequence[State], reached: tuple[int, int] = (0, 0)) -> bool:
    """The server says so of the first chunks of the window, and of the rest what it says last."""
    numbers = plan.window(share)
    said = [*states, *[states[-1]] * (len(numbers) - len(states))][: len(numbers)]
    epoch, position = reached
    reply = StagedAhead(states=said, errors={}, epoch=epoch, position=position, ahead_bytes=0)
    return plan.answered(share, numbers, plan.wanted(share, numbers), reply)


def test_what_is_here_isnt_asked_for_again() -> None:
    plan, share = plan_of_one_server()
    assert answer(plan, share, ["here"])
    assert plan.window(share) == list(range(WINDOW, COUNT))
    assert answer(plan, share, ["read", "here"])
    assert plan.is_done
    assert plan.staged == COUNT


def test_what_is_here_behind_what_there_is_no_room_for_is() -> None:
    """It is needed later than that, and so may go for it; nobody would fetch it again."""
    plan, share = plan_of_one_server()
    answer(plan, share, ["here", "coming", "later", "here", "later"])
    assert share.is_held_up
    assert not share.is_late  # something is coming
    assert plan.staged == 2
    assert plan.window(share) == list(range(1, 1 + HELD_UP))
    answer(plan, share, ["here", "coming", "later"])  # number 3 has yielded
    assert plan.staged == 2
    assert plan.window(share)[:2] == [2, 3]
    answer(plan, share, ["later"])
    assert share.is_late
    answer(plan, share, ["read", "here", "coming"])
    assert not share.is_held_up
    assert plan.window(share)[0] == 4
    assert len(plan.window(share)) == WINDOW


def test_all_is_asked_for_in_the_end() -> None:
    plan, share = plan_of_one_server()
    asked: set[int] = set()
    for turn in range(200):
        for states in (["coming", "here", "later"], ["here", "read", "coming"], ["here"])[turn % 3 :]:
            asked.update(plan.window(share))
            answer(plan, share, states)  # type: ignore[arg-type]
        if plan.is_done:
            break
    assert plan.is_done
    assert asked == set(range(COUNT))


def test_of_an_epoch_that_has_not_begun_little_is_asked_for_until_it_is_here() -> None:
    """What waits at the server when the epoch begins would be overtaken by all that is asked for then."""
    plan, share = plan_of_one_server(1, running=False)
    assert plan.window(share) == list(range(LATER))
    answer(plan, share, ["here", "coming"])
    assert plan.window(share) == list(range(1, LATER))  # nothing beside what is coming
    answer(plan, share, ["coming"])
    assert plan.window(share) == list(range(1, LATER))
    answer(plan, share, ["here"])
    assert plan.window(share)[0] == LATER
    answer(plan, share, ["coming"], reached=(1, 0))  # it begins
    assert plan.window(share) == list(range(LATER, LATER + WINDOW))


def test_what_is_here_of_an_epoch_that_has_not_begun_is_passed_quickly() -> None:
    plan, share = plan_of_one_server(1, running=False)
    steps = []
    while not plan.is_done:
        steps.append(len(plan.window(share)))
        answer(plan, share, ["here"])
    assert steps[:3] == [LATER, 2 * LATER, 4 * LATER]
    assert max(steps) == LATER_MOST
