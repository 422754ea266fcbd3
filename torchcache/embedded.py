"""The embedded pool on disk and in processes: who uses it, who serves it.

A pool lives in one folder. Every process that uses it holds `clients.lock` there, shared, for as long as it lives;
whoever attaches holds `pool.lock` while it looks which servers run and starts those that do not. Each server holds
the `server.lock` of its own folder and says in `endpoint.json` where it listens. The kernel frees locks with their
process, so that SIGKILL of any of them leaves nothing stale.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchcache import environment
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.lanes.connections import connections
from torchcache.plain_files import read_plain
from torchcache.pool.control import ControlClient
from torchcache.pool.members import Endpoint, parse_address
from torchcache.presence import locked, pool_lock, presence
from torchcache.server_process import ServerProcess, start_server
from torchcache.wire.v1 import cache_pb2

ATTACH_S: Final = 45.0
"""How long attaching may take: a server that is just leaving is waited for by the one that follows it."""

STOP_S: Final = 45.0
"""How long a server may take to stop: it drains its uploads first."""

_POLL_S: Final = 0.01
_SHARE_OF_DISK: Final = 10
_LEAST_BYTES: Final = 1024**3


@dataclass(frozen=True, kw_only=True)
class EmbeddedMembers:
    """The servers of the embedded pool in folder `root`, started when they are needed.

    `servers` and `capacity_bytes` (of all servers together) None take what runs, or one server and a tenth of the
    disk's free bytes.
    """

    root: Path
    servers: int | None = None
    capacity_bytes: int | None = None
    embedded: bool = True
    holds_s: float | None = None

    @property
    def description(self) -> str:
        return str(self.root)

    @property
    def access(self) -> Access:
        return Access(token_file=self.root / "token")

    def resolve(self, *, deadline: float) -> Sequence[Endpoint]:
        """Attaches this process to the pool; see `MemberSource.resolve`."""
        with connections.call():  # a fork in between would leave the child half attached
            found = attach(self, min(deadline, time.monotonic() + ATTACH_S))
            endpoints = [parse_address(fields["control"])[0] for fields in found]
            for endpoint, fields in zip(endpoints, found, strict=True):
                self._send_credentials(endpoint, fields, deadline)
        return endpoints

    def _send_credentials(self, endpoint: Endpoint, fields: Mapping[str, Any], deadline: float) -> None:
        """Another process may have started the server, with credentials that have run out since."""
        ours = environment.credentials()
        if not ours or fields.get("credentials_digest") == environment.credentials_digest(ours):
            return
        request = cache_pb2.CredentialsRequest(variables=ours)
        ControlClient(endpoint.address, self.access).call("SetCredentials", request, deadline=deadline)


def attach(pool: EmbeddedMembers, deadline: float) -> list[dict[str, Any]]:
    """Marks this process as a user of the pool and starts what does not run; returns the servers' endpoint files.

    Raises ConfigurationError if the folder can't be used or runs with another number of servers, ServerUnavailable if
    a server does not start.
    """
    make_folder(pool.root)
    with pool_lock(pool.root, deadline):
        presence.hold(pool.root)
        count = _count(pool)
        folders = [pool.root / f"server-{index}" for index in range(count)]
        starting = [_start(pool, index, count) if not running(f) else None for index, f in enumerate(folders)]
        return [_ready(folder, child, deadline) for folder, child in zip(folders, starting, strict=True)]


def make_folder(root: Path) -> None:
    """Makes the pool's folder. Raises ConfigurationError if that can't be, or if other users could change it.

    Who writes there says where the servers listen, and so who gets the token.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
    except OSError as error:
        raise ConfigurationError(
            f"the pool's folder {root} can't be made ({error.strerror}): set TORCHCACHE_HOME, or pass root="
        ) from error
    if status.st_uid != os.geteuid():
        raise ConfigurationError(
            f"the pool's folder {root} belongs to another user (uid {status.st_uid}): set TORCHCACHE_HOME, or pass "
            "root="
        )
    if status.st_mode & stat.S_IWOTH:
        raise ConfigurationError(
            f"everyone may write to the pool's folder {root}: chmod 700 it, set TORCHCACHE_HOME, or pass root="
        )


def running(folder: Path) -> bool:
    """Whether a server lives in `folder` and has said where."""
    return locked(folder / "server.lock") and read_endpoint(folder) is not None


def read_endpoint(folder: Path) -> dict[str, Any] | None:
    """What the server in `folder` says of itself; None if nothing readable."""
    try:
        fields = json.loads(read_plain(folder / "endpoint.json"))
        return fields if isinstance(fields, dict) and isinstance(fields.get("control"), str) else None
    except (OSError, ValueError):
        return None


def default_capacity_bytes(root: Path) -> int:
    """A tenth of what the disk has free, counting what the pool itself holds; at least 1 GiB if that much is free."""
    held = sum(_disk_bytes(path) for path in root.glob("server-*/**/*"))
    free = shutil.disk_usage(root).free + held
    return min(free, max(free // _SHARE_OF_DISK, _LEAST_BYTES))


def _disk_bytes(path: Path) -> int:
    try:
        found = path.lstat()
    except OSError:  # removed meanwhile
        return 0
    return found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0


def _count(pool: EmbeddedMembers) -> int:
    """The number of servers: of those that run, else what was asked for. Under `pool.lock`."""
    alive = sum(locked(path) for path in pool.root.glob("server-*/server.lock"))
    described = pool.root / "pool.json"
    if alive:
        try:
            count = int(json.loads(read_plain(described))["servers"])
        except (OSError, ValueError, KeyError, TypeError):
            count = alive
        if pool.servers is not None and pool.servers != count:
            raise ConfigurationError(
                f"the pool {pool.root} runs with {count} servers, not {pool.servers}: ask for as many, or wait until "
                "nobody uses it"
            )
        return count
    count = pool.servers or 1
    temporary = described.with_suffix(".new")
    temporary.write_text(json.dumps({"servers": count}))
    temporary.replace(described)
    return count


def _start(pool: EmbeddedMembers, index: int, count: int) -> ServerProcess:
    folder = pool.root / f"server-{index}"
    child = presence.child(folder)
    if child is None or not child.alive:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "endpoint.json").unlink(missing_ok=True)  # of a server that was killed
        capacity = (pool.capacity_bytes or default_capacity_bytes(pool.root)) // count
        child = start_server(pool.root, index, capacity_bytes=capacity, log=folder / "server.log")
        presence.adopt(folder, child)
    return child


def _ready(folder: Path, child: ServerProcess | None, deadline: float) -> dict[str, Any]:
    while True:
        if running(folder) and (fields := read_endpoint(folder)) is not None:
            return fields
        if child is not None and not child.alive:
            raise child.failure()
        if time.monotonic() >= deadline:
            reason = child.failure().message if child is not None else f"see {folder / 'server.log'}"
            raise ServerUnavailable(f"the embedded server in {folder} did not get ready in time: {reason}")
        time.sleep(_POLL_S)


def release(root: Path) -> None:
    """This process leaves the pool; the servers it started are stopped if nobody else uses it.

    Raises ServerUnavailable if one does not stop.
    """
    if not root.is_dir():
        return
    with connections.call(), pool_lock(root, time.monotonic() + ATTACH_S):
        if not presence.leave(root):
            return
        children = presence.children(root)
        for child in children:
            child.terminate()
    # Without the lock, and outside the gate: a server that sees nobody attach uploads what is left before it ends.
    deadline = time.monotonic() + STOP_S
    for child in children:
        child.wait(deadline)
