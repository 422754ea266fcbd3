"""Power cuts at every call to the disk, and all that may survive of what isn't durable (F1, F2, F3, F4, F30, F36).

The real store and the real saves start over each state, and must find what was promised (I1, I2, I3, I6). A state is a
prefix of the calls, what survives, and the seed that draws it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.crash.exploring import Effort, Findings, explore
from tests.crash.workloads import SAVE_WORKLOADS, STORE_WORKLOADS
from tests.proofs import proof

WORKLOADS = [*STORE_WORKLOADS, *SAVE_WORKLOADS]
SEED = int(os.environ.get("CRASH_SEED", "1"))
STATES = int(os.environ.get("CRASH_STATES", "1000000"))
"""How many the long run is to reach; CRASH_SEED is the first seed of both runs."""
QUICK = Effort(draws=1, kills=2, cuts=1)
LONG = Effort(draws=2, kills=10, cuts=10)


def assert_kept(findings: Findings) -> None:
    shown = "\n".join(findings.violations[:5])
    assert not findings.violations, f"{len(findings.violations)} broken promises, seed {SEED}:\n{shown}"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_power_cut_at_any_call_breaks_no_promise(workload: str) -> None:
    findings = explore(workload, SEED, QUICK)
    assert_kept(findings)
    assert findings.states > 20 * len(WORKLOADS)


@pytest.mark.long
def test_a_million_crash_states() -> None:
    total = Findings()
    with (
        proof("crash-states") as figures,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        print(f"crash states from seed {SEED}")
        for seed in itertools.count(SEED):
            for findings in pool.map(explore, WORKLOADS, itertools.repeat(seed), itertools.repeat(LONG)):
                total.add(findings)
            assert_kept(total)
            if total.states >= STATES:
                break
        figures.update(
            states=total.states,
            distinct_images=len(total.images),
            traces=total.traces,
            calls=total.calls,
            first_seed=SEED,
            last_seed=seed,
        )
        print(figures)
