"""Hosts of a test's own: network namespaces with addresses and disks, joined by a bridge. They need no root.

A namespace lives as long as a process in it does. The first of each ends when its standard input does, and the others
when who started them does: with us at the latest. None of them has a name on the machine: nothing can be left behind,
also by a run that was killed, and runs side by side don't meet.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

WAIT_S: Final = 120.0

_PREFIX: Final = "10.77.0."
_UNSHARE: Final = ("unshare", "--user", "--map-root-user", "--net", "--mount")
_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")
_TRY: Final = (
    "ip link add hub type bridge && ip link add name a type veth peer name b && mount -t tmpfs none /tmp && "
    "unshare --net --pid --fork --kill-child ip link set lo up"
)
_HUB: Final = "ip link add hub type bridge forward_delay 0 && ip link set hub up && echo ready && exec cat"
_HOST: Final = 'mount -t tmpfs -o size="$1" none "$0" && ip link set lo up && echo ready && exec cat'


@functools.cache
def why_no_networks() -> str:
    """Why this machine can't have them; empty if it can."""
    if missing := [tool for tool in ("ip", "nsenter", "setpriv", "unshare") if shutil.which(tool) is None]:
        return f"no {', '.join(missing)} here: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", _TRY],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


class _Namespace:
    """One that is held by a process of its own, which runs `script` and says that it is ready."""

    def __init__(self, command: Sequence[str], script: str, *arguments: str) -> None:
        self._holder = subprocess.Popen(
            [*command, "sh", "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--preserve-credentials", "-t", str(self.pid), "--user", *namespaces]

    def end(self) -> None:
        self._holder.communicate()


class Host:
    """A host: an address, a tmpfs, and what stands before commands that are to run `through` it."""

    def __init__(self, number: int, disk: Path, namespace: _Namespace) -> None:
        self.address = f"{_PREFIX}{number}"
        self.disk = disk
        self._namespace = namespace

    @property
    def through(self) -> list[str]:
        """Of one process, whose pid is that of the command. It dies with the thread that starts it."""
        return [*self._namespace.enter("--net", "--mount"), *_DIES_WITH_US]

    @property
    def with_children(self) -> list[str]:
        """As `through`, of a process that starts others: all of them go when the command is killed."""
        return [*self.through, "unshare", "--pid", "--fork", "--kill-child"]

    def seen(self, path: Path) -> Path:
        """A path of the host, from outside."""
        return Path(f"/proc/{self._namespace.pid}/root{path}")

    def run(self, *command: str) -> str:
        """What a command says that has to succeed there."""
        done = subprocess.run(
            [*self.through, *command], check=True, stdout=subprocess.PIPE, text=True, timeout=WAIT_S
        )
        return done.stdout

    def link(self, state: Literal["up", "down"]) -> None:
        """Plugs its cable in, or pulls it."""
        self.run("ip", "link", "set", "eth0", state)

    def add_address(self, number: int) -> str:
        """Another address of the host."""
        address = f"{_PREFIX}{number}"
        self.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        return address


class OwnNetwork:
    """A bridge, and the hosts that were added to it. Context manager."""

    def __enter__(self) -> Self:
        self._closing = ExitStack()
        self._hub = _Namespace(_UNSHARE, _HUB)
        self._closing.callback(self._hub.end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def add(self, number: int, disk: Path, size: str = "64m") -> Host:
        """A host at 10.77.0.`number`, with a tmpfs of its own at `disk`, which others see as an empty folder."""
        disk.mkdir(parents=True, exist_ok=True)
        namespace = _Namespace(
            [*self._hub.enter("--mount"), "unshare", "--net", "--mount"], _HOST, str(disk), size
        )
        self._closing.callback(namespace.end)
        host = Host(number, disk, namespace)
        cable = f"to-{number}"
        for command in (
            ("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(namespace.pid)),
            ("link", "set", cable, "master", "hub", "up"),
        ):
            subprocess.run([*self._hub.enter("--net"), "ip", *command], check=True, timeout=WAIT_S)
        host.add_address(number)
        host.link("up")
        return host
