"""Every way to the disk fails, one after the other, with every error: what was promised holds, and nothing leaks.

The sites aren't listed anywhere: a run without faults shows them, and each is then a case of its own. What only runs
once something has failed shows in those cases, and fails there as a second fault.
"""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import shutil
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from torchcache_server.store import core

from tests.proofs import proof
from tests.unit.store_parts import crash_image, descriptors, small_store
from tests.unit.store_sites import SHORT, Fault, Site, SiteDisk, written_sites
from tests.unit.store_world import World, first_life, leave_old_store, prepare, second_life

CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR)
QUICK = {
    *((errno.EIO, always) for always in (False, True)),
    *((SHORT, always) for always in (False, True)),
    (errno.ENOSPC, True),
    (errno.EMFILE, False),
    (errno.EINTR, False),
}
"""What may happen at every place in the quick run: each error, for good where that differs from EIO's."""
MIN_SITES = 150
MAX_RESTING = 2

UNREACHED = {
    "folder.py names in _refuse_lost_ledgers": "its folder of flags is gone: nothing is opened then",
}
"""Calls that no case comes by, and why."""


class Seen(NamedTuple):
    """Where a site was met: in which life, and in which phases of it."""

    life: int
    phases: list[int]


class Matrix:
    """Runs cases and gathers what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases = 0
        self.wrong: list[str] = []
        self.sites: dict[Site, Seen] = {}
        self.behind: dict[
            Site, tuple[Fault, Seen]
        ] = {}  # sites that only a fault leads to, and what led there
        self.prepared = World(folder / "prepared", SiteDisk())
        prepare(self.prepared)
        leave_old_store(folder / "old")
        for life in (0, 1, 2):
            disk = SiteDisk()
            self.run(life, disk, 0)
            for site, phases in disk.seen.items():
                self.sites.setdefault(site, Seen(life, phases))

    def run(self, life: int, disk: SiteDisk, phase: int) -> None:
        """Lets a store live on `disk`, which is mended after a phase; what is wrong then raises AssertionError."""
        descriptors_before = descriptors(self.folder)
        folder = self.folder / "store"
        before = None
        if life == 1:
            crash_image(self.folder / "old", folder)
        elif life == 2:
            crash_image(self.folder / "prepared", folder)
            before = self.prepared
        try:
            world = World(folder, disk, before=before, mend_after=phase)
            (second_life if life == 2 else first_life)(world)
        finally:
            for left in (folder, folder.with_name("image")):
                shutil.rmtree(left, ignore_errors=True)
        assert descriptors(self.folder) <= descriptors_before, "I5: descriptors were left open"
        assert not disk.synced_again, "F13: an fsync was tried again"

    def case(self, faults: Sequence[Fault], seen: Seen) -> None:
        disk = SiteDisk(faults)
        self.cases += 1
        try:
            self.run(seen.life, disk, seen.phases[faults[-1].after])
            assert disk.failed >= len(faults), "it was never called"
        except Exception as error:
            at = " > ".join(f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[1:])
            gc.collect()  # what a store that wasn't closed has open is no fault of the next case
            self.wrong.append(f"{'; '.join(map(str, faults))}: {error!r} at {at}")
        for site in disk.seen.keys() - self.sites.keys():
            self.behind.setdefault(site, (faults[0], Seen(seen.life, disk.seen[site])))

    def faults(self, *, whole: bool) -> Iterator[tuple[Fault, Seen]]:
        """`QUICK` at every place in the sources, and EIO on every way to it; `whole`: every error on every way."""
        places = set()
        for site, seen in self.sites.items():
            is_new = site.place not in places
            places.add(site.place)
            codes = (*CODES, SHORT) if site.call in ("pwritev", "pread") else CODES
            for code, always in itertools.product(codes, (False, True)):
                if whole or (is_new and (code, always) in QUICK) or (code == errno.EIO and always):
                    yield Fault(site, code, always), seen
            if len(seen.phases) > 1 and (whole or is_new):
                yield Fault(site, errno.EIO, always=False, after=1), seen

    def untouched(self) -> list[str]:
        """Calls in the sources that no case came by."""
        met = {(site.call, *site.lines[0][:2]) for site in self.sites.keys() | self.behind.keys()}
        return sorted(
            f"{file} {call} in {function}"
            for (file, call, function), places in written_sites().items()
            for lines in places
            if not any((call, file, line) in met for line in lines)
        )


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_site_may_fail_with_every_error(
    whole: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10, F11, F12, F13, F14, F15, I1, I2, I5, I6: our errors, nothing promised is lost, and then it works again."""
    caplog.set_level(logging.CRITICAL, "torchcache_server")
    monkeypatch.setattr(core, "MAX_RESTING", MAX_RESTING)
    with proof("errno-matrix") as figures, small_store() as folder:
        matrix = Matrix(folder)
        for fault, seen in matrix.faults(whole=whole):
            matrix.case([fault], seen)
        for site, (first, seen) in list(matrix.behind.items()):
            for code in CODES if whole else CODES[:1]:
                matrix.case([first, Fault(site, code, always=True)], seen)
        wrong = "\n".join(matrix.wrong[:20])
        assert not matrix.wrong, f"{len(matrix.wrong)} of {matrix.cases} cases:\n{wrong}"
        left = set(matrix.untouched()) ^ UNREACHED.keys()
        assert not left, f"no case comes by: see to it in `store_world`, or say why in UNREACHED: {left}"
        places = {site.place for site in matrix.sites.keys() | matrix.behind.keys()}
        figures["call_sites"] = str(len(places))  # words: two runs don't add up
        figures["ways_to_them"] = str(len(matrix.sites) + len(matrix.behind))
        figures["cases"] = matrix.cases
    assert len(matrix.sites) >= MIN_SITES
