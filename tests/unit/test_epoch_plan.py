"""What an epoch's plan asks for again: what is coming, what there is no room for, what may have to yield to that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchcache.data.chunk_table import ChunkTable
from torchcache.data.epoch_plan import HELD_UP, WINDOW, EpochPlan, Share
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement
from torchcache.pool.orders import OrderKey, StagedAhead, State

COUNT = 1000


def extents(indices: Sequence[int]) -> list[Extent]:
    return [Extent(ObjectInfo(ObjectId("s3", f"{index:04d}", "1"), 10), 0, 10) for index in indices]


def plan_of_one_server() -> tuple[EpochPlan, Share]:
    table = ChunkTable(extents, COUNT, Placement(["server"]))
    plan = EpochPlan(OrderKey("s3", "order"), 0, np.arange(COUNT), table, ["server"], running=True)
    return plan, plan.shares[0]


def answer(plan: EpochPlan, share: Share, states: Sequence[State]) -> bool:
    """The server says so of the first chunks of the window, and of the rest what it says last."""
    numbers = share.window()
    said = [*states, *[states[-1]] * (len(numbers) - len(states))][: len(numbers)]
    reply = StagedAhead(states=said, errors={}, epoch=0, position=0, ahead_bytes=0)
    return plan.answered(share, numbers, plan.wanted(share, numbers), reply)


def test_what_is_here_isnt_asked_for_again() -> None:
    plan, share = plan_of_one_server()
    assert answer(plan, share, ["here"])
    assert share.window() == list(range(WINDOW, COUNT))
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
    assert share.window() == list(range(1, 1 + HELD_UP))
    answer(plan, share, ["here", "coming", "later"])  # number 3 has yielded
    assert plan.staged == 2
    assert share.window()[:2] == [2, 3]
    answer(plan, share, ["later"])
    assert share.is_late
    answer(plan, share, ["read", "here", "coming"])
    assert not share.is_held_up
    assert share.window()[0] == 4
    assert len(share.window()) == WINDOW


def test_all_is_asked_for_in_the_end() -> None:
    plan, share = plan_of_one_server()
    asked: set[int] = set()
    for turn in range(200):
        for states in (["coming", "here", "later"], ["here", "read", "coming"], ["here"])[turn % 3 :]:
            asked.update(share.window())
            answer(plan, share, states)  # type: ignore[arg-type]
        if plan.is_done:
            break
    assert plan.is_done
    assert asked == set(range(COUNT))
