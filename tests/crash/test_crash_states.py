"""Power cuts at every call to the disk, and all that may survive of what isn't durable (F1, F2, F3, F4, F30, F36).

The real store and the real saves start over each state, and must find what was promised (I1, I2, I3, I6). A state is a
prefix of the calls and an image of the disk that may be found behind it; extremes, and many drawn by seed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.crash.exploring import Effort, Findings, explore
from tests.crash.workloads import SAVE_WORKLOADS, STORE_WORKLOADS
from tests.proofs import proof

WORKLOADS = os.environ.get("CRASH_WORKLOADS", "").split() or [*STORE_WORKLOADS, *SAVE_WORKLOADS]
SEED = int(os.environ.get("CRASH_SEED", "1"))
STATES = int(os.environ.get("CRASH_STATES", "1000000"))
"""How many the long run is to reach; CRASH_SEED is the first seed of both runs, CRASH_WORKLOADS are those to run."""
WAYS = int(os.environ.get("CRASH_WAYS", "2"))
"""What survives at random is drawn in so many ways for each prefix; in the long run, and for mutants, in all."""
QUICK = Effort(draws=1, kills=1, cuts=0, ways=WAYS)
LONG = Effort(draws=3, kills=10, cuts=10)


def assert_kept(findings: Findings) -> None:
    shown = "\n".join(findings.violations[:5])
    assert not findings.violations, f"{len(findings.violations)} broken promises, seed {SEED}:\n{shown}"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_power_cut_at_any_call_breaks_no_promise(workload: str) -> None:
    findings = explore(workload, SEED, QUICK)
    assert_kept(findings)
    assert findings.states > 100


@pytest.mark.long
def test_a_million_crash_states() -> None:
    total = Findings()
    with (
        proof("crash-states") as figures,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        print(f"crash states from seed {SEED}")
        work = ((workload, seed) for seed in itertools.count(SEED) for workload in WORKLOADS)
        running = deque(pool.submit(explore, *next(work), LONG) for _ in range(4))
        while running:
            total.add(running.popleft().result())
            if total.states < STATES and not total.violations:
                running.append(pool.submit(explore, *next(work), LONG))
        _, last_seed = next(work)
        assert_kept(total)
        figures.update(
            states=total.states,
            draws=total.draws,
            distinct_images=len(total.images),
            traces=total.traces,
            calls=total.calls,
            first_seed=SEED,
            last_seed=last_seed,
        )
        print(figures)
