"""States: from where a reader is, as plain values, to what others, of any number, go on with. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchcache.data.iterable_pass import STATE, Epoch, Pass
from torchcache.data.iterable_position import Rest, Split
from torchcache.data.iterable_recording import RecordingPass
from torchcache.errors import ConfigurationError

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is left of an epoch, for readers of any split."""

    epoch: int
    seed: int
    rest: Rest


def left_of(states: Sequence[State]) -> Left:
    """What is left behind the states of all workers of a rank.

    Raises ConfigurationError for states that don't belong together, and for damaged ones.
    """
    first = states[0]
    split = _split(first)
    counts: dict[int, int] = {}
    for state in states:
        if any(state.get(name) != first.get(name) for name in ("epoch", "seed", "left", "total", "split")):
            raise ConfigurationError("the states of a loader's workers are of different epochs or splits")
        counts[_number(state, "worker")] = _number(state, "count")
    if sorted(counts) != list(range(split.workers)):
        raise ConfigurationError(
            f"this is the state of {len(counts)} of {split.workers} workers. To go on with other ranks or workers, "
            "give load_state_dict of the dataset the whole state of the StatefulDataLoader, and then make the new "
            "loader"
        )
    taken = split.taken(_number(first, "total"), [counts[worker] for worker in range(split.workers)])
    rest = Rest.of_plain(_numbers(first, "left")).without(taken)
    return Left(epoch=_number(first, "epoch"), seed=_seed(first), rest=rest)


def pass_of(state: State, split: Split, rank: int, worker: int) -> Pass | None:
    """The pass that goes on from the state of the same worker under the same split; None if it is of another."""
    if _split(state) != split or _number(state, "worker") != worker:
        return None
    epoch = Epoch(
        number=_number(state, "epoch"),
        seed=_seed(state),
        rest=Rest.of_plain(_numbers(state, "left")),
        total=_number(state, "total"),
        split=split,
    )
    return Pass(epoch, rank, worker, _number(state, "count"))


def after_batches(epoch: Epoch, batches: int, batch_size: int) -> Left:
    """What is left once each rank had so many batches from its workers, who take turns."""
    split = epoch.split
    shares = [split.share(epoch.total, 0, worker) for worker in range(split.workers)]
    # A worker that is through with its share loses its turns.
    rounds = [-(-share // batch_size) for share in shares]
    turns = sorted((turn, worker) for worker, most in enumerate(rounds) for turn in range(most))[:batches]
    counts = [0] * split.workers
    for _, worker in turns:
        counts[worker] = min(shares[worker], counts[worker] + batch_size)
    rest = epoch.rest.without(split.taken(epoch.total, counts))
    return Left(epoch=epoch.number, seed=epoch.seed, rest=rest)


def recording_pass_of(state: State) -> RecordingPass:
    """The pass over a dataset that isn't recorded yet, from its state."""
    return RecordingPass(
        _number(state, "epoch"), _split(state), _number(state, "worker"), _number(state, "count")
    )


def of_loader(state: State) -> list[State]:
    """The dataset's states, one a worker, in a StatefulDataLoader's; a state of the dataset's own as it is.

    Raises ConfigurationError if there are none.
    """
    if "torchcache" in state:
        return [state]
    if state.get("_steps_since_snapshot"):
        raise ConfigurationError(
            "the loader's state is older than its position: make the StatefulDataLoader with snapshot_every_n_steps=1 "
            "and in_order=True"
        )
    snapshot = state.get("_snapshot")
    workers = snapshot.get("_worker_snapshots") if isinstance(snapshot, Mapping) else None
    found = (
        [one.get("dataset_state") for one in workers.values()] if workers else [state.get("dataset_state")]
    )
    states = [one for one in found if isinstance(one, Mapping) and "torchcache" in one]
    if len(states) < len(found):
        raise ConfigurationError(
            "this is neither a state of a CachedIterableDataset nor of a loader over one"
        )
    return states


def _split(state: State) -> Split:
    if state.get("torchcache") != STATE:
        raise ConfigurationError("this is no state of a CachedIterableDataset, or one of another version")
    numbers = _numbers(state, "split")
    if len(numbers) != 4 or min(numbers[:3]) < 1:
        raise _damaged("split", numbers)
    return Split(ranks=numbers[0], workers=numbers[1], run=numbers[2], contiguous=bool(numbers[3]))


def _numbers(state: State, name: str) -> Sequence[int]:
    value = state.get(name)
    if not isinstance(value, Sequence) or not all(isinstance(number, int) for number in value):
        raise _damaged(name, value)
    return value


def _number(state: State, name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or value < 0:
        raise _damaged(name, value)
    return value


def _seed(state: State) -> int:
    value = state.get("seed")
    if not isinstance(value, int):
        raise _damaged("seed", value)
    return value


def _damaged(name: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"a dataset's state is damaged: {name!r} is {value!r}")
