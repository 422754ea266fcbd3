"""A server of the embedded pool as a child process that outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from torchcache.errors import ConfigurationError, ServerUnavailable, TorchCacheError

UNDER_STORES: Final = ("s3=s3://", "file=file:///")
IDLE_S: Final = 15.0
"""How long a server lives on when no process uses its pool."""

REFUSED: Final = 2
"""The server's exit code when its settings are wrong: starting it again would not help."""

_TAIL_BYTES: Final = 2000


class _Detached(subprocess.Popen[bytes]):
    """A child that is meant to live on: no warning when it does."""

    def __del__(self, *_: Any) -> None:
        pass


class ServerProcess:
    """A server this process started. `log` is where it writes."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        """Asks the server to drain and end."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Waits for the server's end. Raises ServerUnavailable after killing one that does not end in time.

        What a killed server had not uploaded lies in its store; the next start goes on with it.
        """
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServerUnavailable(
                f"the embedded server {self.pid} did not end in time; see {self._log}"
            ) from None

    def failure(self) -> TorchCacheError:
        """Why it did not get ready: the end of its log."""
        code = self._process.poll()
        state = "is not ready" if code is None else f"ended with code {code}"
        tail = self._tail()
        kind = ConfigurationError if code == REFUSED else ServerUnavailable
        return kind(f"the embedded server {state}; {self._log} ends with: {tail}")

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return file.read().decode(errors="replace").strip() or "(nothing)"
        except OSError as error:
            return f"({error.strerror})"


def start_server(root: Path, index: int, *, capacity_bytes: int, log: Path) -> ServerProcess:
    """Starts server `index` of the embedded pool in `root`, in a session of its own, with our environment."""
    command = [
        sys.executable,
        "-P",  # the working directory is no place to import from
        "-m",
        "torchcache_server",
        *("--embedded", str(root)),
        *("--index", str(index)),
        *("--capacity", str(capacity_bytes)),
        *("--idle-s", str(IDLE_S)),
    ]
    for under_store in UNDER_STORES:
        command += ["--under-store", under_store]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        process = _Detached(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            cwd=root,
        )
    except OSError as error:
        raise ServerUnavailable(f"the embedded server can't be started: {error}") from error
    finally:
        os.close(descriptor)
    return ServerProcess(process, log)
