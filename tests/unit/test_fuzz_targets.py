"""A taste of every fuzz target: `make test-long` and `make fuzz` run them in earnest."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutating import mutated
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_is_handled_otherwise_than_it_must_be(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target.run(seed)
    for number, data in enumerate(mutated(target.seeds, 400, random.Random(7))):
        try:
            target.run(data)
        except Exception:
            print(f"execution {number}: {data!r}")
            raise


@pytest.mark.parametrize("name", ["header", "ticket", "descriptor", "checkpoint-manifest", "sample"])
def test_seeds_reach_what_lies_behind_the_first_check(name: str) -> None:
    """A target whose seeds are all refused would prove nothing: what they are changed into is refused at once, too."""
    seeds = TARGETS[name].seeds
    assert _taken(name, seeds[-1] if name == "checkpoint-manifest" else seeds[0])


def _taken(name: str, data: bytes) -> bool:
    from torchcache_server.service.requests import read_plan, write_plan

    from tests.fuzz.targets import NONCE
    from torchcache.checkpoint.manifest import Manifest
    from torchcache.data import codec
    from torchcache.records import decode_record

    match name:
        case "header":
            return decode_record(memoryview(data), NONCE, 0) is not None
        case "ticket":
            return len(read_plan(data).object) == 2
        case "descriptor":
            return write_plan(data).durable
        case "sample":
            return isinstance(codec.decode(data), dict)
        case _:
            return bool(data) and bool(Manifest.decode(data, where="x").items)
