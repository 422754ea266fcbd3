"""The pool's contract, by both lanes, with one server and with three.

Each lane and each number is in the short run; the other two pairs add little to what the lanes' own contracts show.
"""

from __future__ import annotations

import pytest

from tests.conformance.pool_contract import PoolContract


class TestLocalOne(PoolContract):
    lane, count = "local", 1


@pytest.mark.long
class TestLocalThree(PoolContract):
    lane, count = "local", 3


@pytest.mark.long
class TestFlightOne(PoolContract):
    lane, count = "flight", 1


class TestFlightThree(PoolContract):
    lane, count = "flight", 3
