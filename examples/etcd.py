"""An etcd on this machine, from Debian's `etcd-server` or wherever `etcd` is in the path."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.ports import free_port

START_S = 60.0


class Etcd:
    """One etcd whose data lies in `folder`, on a port of its own that stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port(beside=1)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def installed() -> bool:
        return shutil.which("etcd") is not None

    def address(self, pool: str) -> str:
        """What a pool of that name is connected to by."""
        return f"etcd://127.0.0.1:{self._port}/{pool}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it answers."""
        client, peer = (f"http://127.0.0.1:{self._port + i}" for i in (0, 1))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(
                        "etcd",
                        "--data-dir",
                        str(self._folder / "data"),
                        "--initial-cluster",
                        f"default={peer}",
                    ),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while not self._healthy(client):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"etcd does not start: see {self._folder / 'etcd.log'}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9; its data stays."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def forget(self) -> None:
        """Removes its data, while it does not run."""
        shutil.rmtree(self._folder / "data")

    @staticmethod
    def _healthy(client: str) -> bool:
        try:
            with urllib.request.urlopen(f"{client}/health", timeout=2) as answer:
                return b'"true"' in answer.read()
        except (urllib.error.URLError, OSError):
            return False
