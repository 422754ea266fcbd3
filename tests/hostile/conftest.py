"""One server for all cases of a file (of each worker's, where they run side by side), looked at after each.

It isn't a run's: a client of it would live on in the process, and what comes next there may fork.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.hostile_server import HostileServer


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileServer]:
    with HostileServer(tmp_path_factory.mktemp("hostile")) as server:
        yield server


@pytest.fixture
def server(hostile_server: HostileServer) -> Iterator[HostileServer]:
    """The server; after the test it must be the same, unharmed."""
    yield hostile_server
    hostile_server.s3.always = None
    hostile_server.s3.script.clear()
    hostile_server.assert_unharmed()
