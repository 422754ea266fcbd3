"""The pool's contract, by both lanes, with one server and with three."""

from __future__ import annotations

from tests.conformance.pool_contract import PoolContract


class TestLocalOne(PoolContract):
    lane, count = "local", 1


class TestLocalThree(PoolContract):
    lane, count = "local", 3


class TestFlightOne(PoolContract):
    lane, count = "flight", 1


class TestFlightThree(PoolContract):
    lane, count = "flight", 3
