"""Embedded pools whose servers are forked off one that has done the imports, which are nine tenths of a start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.integration.store_process_parts import ForkedServer


def _detached(command: Sequence[str], *, stdout: int, stderr: int, **_: object) -> ForkedServer:
    return ForkedServer(command[command.index("torchcache_server") + 1 :], stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module", autouse=True)
def forked_servers() -> Iterator[None]:
    """How they are really started, tests/integration and the tests of whole programs here see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchcache.server_process._Detached", _detached)
        yield
