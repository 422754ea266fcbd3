"""Embedded pools whose servers are forked off one that has done the imports, which are nine tenths of a start."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.integration.store_process_parts import forking


class ForkedServer:
    """What `start_server` needs of a Popen. Unlike one of that it doesn't outlive the tests' process."""

    def __init__(self, command: Sequence[str], *, stdout: int, stderr: int, **_: object) -> None:
        arguments = command[command.index("torchcache_server") + 1 :]
        self.pid = forking().fork(arguments, [stdout, stderr])
        self._pidfd = os.pidfd_open(self.pid)
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired("torchcache_server", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self._exit_code is None and select.select([self._pidfd], [], [], timeout_s)[0]:
            self._exit_code = forking().exit_code(self.pid)
            os.close(self._pidfd)
        return self._exit_code


@pytest.fixture(scope="module", autouse=True)
def forked_servers() -> Iterator[None]:
    """How they are really started, tests/integration and the tests of whole programs here see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchcache.server_process._Detached", ForkedServer)
        yield
