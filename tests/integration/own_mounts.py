"""File systems of a test's own, in a mount namespace that needs no root: only its servers see them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType


class OwnMount:
    """A tmpfs of `size` at `folder`, for commands that go `through` this namespace. `seen` is our way to it."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._size = size

    def __enter__(self) -> OwnMount:
        script = 'mount -t tmpfs -o size="$1" none "$0" && echo mounted && exec cat'
        self._holder = subprocess.Popen(
            [
                *("unshare", "--user", "--map-root-user", "--mount"),
                *("sh", "-c", script, str(self.folder), self._size),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()

    @property
    def through(self) -> list[str]:
        """What stands before a command that is to run in the namespace."""
        return [*("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(self._holder.pid))]

    @property
    def seen(self) -> Path:
        """The tmpfs, from outside."""
        return Path(f"/proc/{self._holder.pid}/root{self.folder}")

    def run(self, *command: str) -> None:
        """Runs a command in the namespace; it must succeed."""
        subprocess.run([*self.through, *command], check=True, timeout=60)


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill_up(path: Path, *, leave: int = 0) -> None:
    """Somebody else's file takes all the room there is, to the last page, but for `leave` bytes."""
    with path.open("ab", buffering=0) as file:
        while (room := free_bytes(path.parent) - leave) > 0:
            try:
                file.write(bytes(min(room, 1 << 20)))
            except OSError:
                return
