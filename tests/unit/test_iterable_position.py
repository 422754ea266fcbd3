"""Who reads what, and what is left: whatever the splits and wherever one stops, the rest is exactly the rest."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.data.iterable_position import Rest, Split, Uneven
from torchcache.errors import ConfigurationError

SPLITS = st.builds(
    Split,
    ranks=st.integers(1, 5),
    workers=st.integers(1, 5),
    run=st.sampled_from([1, 2, 3, 8]),
    contiguous=st.booleans(),
)
UNEVEN: list[Uneven] = ["pad", "drop", "keep"]


@st.composite
def rests(draw: st.DrawFn) -> Rest:
    marks = sorted(draw(st.sets(st.integers(0, 60), max_size=8)))
    runs = tuple(zip(marks[:-1:2], marks[1::2], strict=False))
    return Rest(runs, draw(st.integers(runs[-1][1] if runs else 0, 70)))


def shares(split: Split, total: int) -> dict[tuple[int, int], list[int]]:
    return {
        (r, w): split.places(total, r, w, 0, split.share(total, r, w)).tolist()
        for r in range(split.ranks)
        for w in range(split.workers)
    }


@given(SPLITS, st.integers(0, 200))
def test_every_place_has_one_reader(split: Split, total: int) -> None:
    found = shares(split, total)
    assert sorted(place for share in found.values() for place in share) == list(range(total))
    assert all(share == sorted(share) for share in found.values())


@given(SPLITS, st.integers(0, 200), st.sampled_from(["pad", "drop"]))
def test_ranks_are_even(split: Split, left: int, uneven: Uneven) -> None:
    total = split.total(left, uneven)
    found = shares(split, total)
    for worker in range(split.workers):
        assert len({len(found[rank, worker]) for rank in range(split.ranks)}) == 1
    assert abs(total - left) < split.ranks
    assert total >= left if uneven == "pad" else total <= left
    assert split.total(left, "keep") == left


@given(rests(), st.lists(st.integers(0, 100), max_size=20))
def test_places_are_positions_in_order(rest: Rest, places: list[int]) -> None:
    held = [p for first, stop in rest.runs for p in range(first, stop)]
    expected = [held[p] if p < len(held) else rest.start + p - len(held) for p in places]
    assert rest.positions(np.array(places, dtype=np.int64)).tolist() == expected
    assert rest.left(100) == len([p for p in held if p < 100]) + max(0, 100 - rest.start)


@given(rests(), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 20)), max_size=6))
def test_what_is_had_is_no_longer_left(rest: Rest, taken: list[tuple[int, int]]) -> None:
    intervals = [(first, first + length) for first, length in taken]
    gone = {p for first, stop in intervals for p in range(first, stop)}
    places = np.arange(250)
    left = rest.without(intervals)
    before = rest.positions(places).tolist()
    expected = [position for place, position in enumerate(before) if place not in gone]
    assert left.positions(np.arange(len(expected))).tolist() == expected
    assert Rest.of_plain(left.plain()) == left


@st.composite
def stops(draw: st.DrawFn, split: Split, total: int) -> list[int]:
    """How far each worker of every rank has come."""
    return [
        draw(st.integers(0, max(split.share(total, rank, worker) for rank in range(split.ranks))))
        for worker in range(split.workers)
    ]


@given(st.integers(0, 120), st.lists(SPLITS, min_size=1, max_size=4), st.sampled_from(UNEVEN), st.data())
def test_stopped_anywhere_and_resumed_by_any_others(
    count: int, splits: list[Split], uneven: Uneven, data: st.DataObject
) -> None:
    """An epoch in parts, each by another world: together they read every sample once."""
    rest, had = Rest(), Counter[int]()
    for number, split in enumerate(splits):
        total = split.total(rest.left(count), uneven)
        last = number == len(splits) - 1
        counts = None if last else data.draw(stops(split, total))
        for (_, worker), share in shares(split, total).items():
            part = share if counts is None else share[: counts[worker]]
            had.update(rest.positions(np.array(part, dtype=np.int64)).tolist())
        if counts is not None:
            rest = rest.without(split.taken(total, counts))
    assert max(had.values(), default=1) == 1  # of positions: none is read twice
    missing = [p for p in range(count) if p not in had]
    extra = [p for p in had if p >= count]
    if uneven == "keep":
        assert not missing and not extra
    elif uneven == "pad":
        assert not missing
        assert len(extra) < max(split.ranks for split in splits) * len(splits)
    else:
        assert not extra
        assert len(missing) < splits[-1].ranks


def counts_after(split: Split, total: int, rank: int, batch: int, steps: int) -> list[int]:
    """How far each of a rank's workers is after so many batches of its loader, which asks them in turn."""
    left = [split.share(total, rank, worker) for worker in range(split.workers)]
    turns = sorted((turn, worker) for worker, n in enumerate(left) for turn in range(-(-n // batch)))
    had = [0] * split.workers
    for _, worker in turns[:steps]:
        had[worker] = min(left[worker], had[worker] + batch)
    return had


@given(st.integers(0, 120), SPLITS, st.integers(1, 5), st.sampled_from(UNEVEN), st.integers(0, 130))
def test_rank_0_says_what_ranks_in_step_have_had(
    left: int, split: Split, batch: int, uneven: Uneven, steps: int
) -> None:
    split = dataclasses.replace(split, run=1 if split.run == 1 else batch)
    total = split.total(left, uneven)
    had = set()
    for rank in range(split.ranks):
        for worker, count in enumerate(counts_after(split, total, rank, batch, steps)):
            had.update(split.places(total, rank, worker, 0, count).tolist())
    told = split.taken(total, counts_after(split, total, 0, batch, steps))
    assert {place for first, stop in told for place in range(first, stop)} == had


@given(st.integers(0, 120), SPLITS, st.data())
def test_one_worker_resumes_in_the_same_order(count: int, split: Split, data: st.DataObject) -> None:
    """With one worker, what was had is the front of the order; the same ranks go on as if nothing had been."""
    split = Split(ranks=split.ranks, workers=1, run=split.run)
    total = split.total(count, "pad")
    stop = data.draw(st.integers(0, total // split.ranks))
    rest = Rest().without(split.taken(total, [stop]))
    assert rest == Rest((), stop * split.ranks)
    again = split.total(rest.left(count), "pad")
    for rank in range(split.ranks):
        whole = split.places(total, rank, 0, 0, split.share(total, rank, 0)).tolist()
        front = whole[:stop]
        back = rest.positions(split.places(again, rank, 0, 0, split.share(again, rank, 0))).tolist()
        assert front + back == whole


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12))
def test_told_the_batch_size_batches_are_the_same_for_any_workers(
    batches: int, workers: int, ranks: int, batch: int
) -> None:
    total = batches * batch * ranks
    one = Split(ranks=ranks, workers=1, run=batch)
    many = Split(ranks=ranks, workers=workers, run=batch)
    for rank in range(ranks):
        alone = one.places(total, rank, 0, 0, batches * batch).reshape(batches, batch)
        for number in range(batches):
            worker, turn = number % workers, number // workers
            found = many.places(total, rank, worker, turn * batch, (turn + 1) * batch)
            assert found.tolist() == alone[number].tolist()


@pytest.mark.parametrize(
    "numbers", [[], [1, 2], [5, 3, 9], [3, 3, 9], [0, 4, 2], [-1], ["x"], [0, 5, 4, 8, 9]]
)
def test_a_damaged_state_is_refused(numbers: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        Rest.of_plain(numbers)
