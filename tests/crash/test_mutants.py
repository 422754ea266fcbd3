"""Every fsync, rename, folder fsync and comparison of checksums is there for a reason: without it a test fails.

The lesson of those who lost a staging fsync in a refactoring, unnoticed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.crash.exploring import record
from tests.crash.mutating import ROOT, copies, killer_of, killers
from tests.crash.mutation import EQUIVALENT, durable_sites, mutants
from tests.crash.volatile import Op
from tests.crash.workloads import SAVE_WORKLOADS, STORE_WORKLOADS
from tests.crash.world import small_world
from tests.proofs import proof

MUTANTS = mutants(ROOT)
ONLY = os.environ.get("CRASH_MUTANTS", "")
"""Only mutants with this in their name."""

SMOKE = {
    "store/ledger.py:_decode xxhash": "tests/unit/test_store_ledger.py",
}


def test_the_mutants_are_found_in_the_source() -> None:
    assert len({found.name for found in MUTANTS}) == len(MUTANTS) > 40
    for found in MUTANTS:
        compile(found.source, found.name, "exec")
        assert found.source != (ROOT / found.path).read_text()
    assert set(EQUIVALENT) <= {found.name for found in mutants(ROOT, without=())}, "each is still there"


def test_the_workloads_pass_every_call_that_makes_something_durable(tmp_path: Path) -> None:
    """What no workload calls, no crash state can prove."""
    passed: set[tuple[str, str]] = set()
    for name in (*STORE_WORKLOADS, *SAVE_WORKLOADS):
        with small_world(1):
            trace = record(name, 1, str(tmp_path))
        calls = [item for item in trace.items if isinstance(item, Op)]
        passed |= {(call.site.partition(" for ")[0], call.call) for call in calls}
    assert durable_sites(ROOT) - passed == set()


@pytest.mark.parametrize("name", SMOKE)
def test_a_mutant_is_noticed(name: str) -> None:
    [found] = [mutant for mutant in MUTANTS if mutant.name.startswith(name)]
    with copies(1) as free:
        assert (killer_of(found, free, [SMOKE[name]]) or "").startswith(SMOKE[name])


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_mutant_is_noticed() -> None:
    chosen = [mutant for mutant in MUTANTS if ONLY in mutant.name]
    survivors = []
    with proof("mutants") as figures:
        for mutant, killer in killers(chosen, processes=2):
            print(f"{mutant.name}\n    {killer or 'SURVIVED'}", flush=True)
            if killer is None:
                survivors.append(mutant.name)
        figures.update(mutants=len(chosen), killed=len(chosen) - len(survivors))
        assert not survivors
