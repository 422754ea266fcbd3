"""What the doctor of a client makes of what it sees. Pure."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

from torchcache.cli.output import size_text
from torchcache.errors import ConfigurationError
from torchcache.lanes.client_token import exposure
from torchcache.tokens import parse_tokens

if TYPE_CHECKING:
    from torchcache.pool import ServerStatus

State = Literal["ok", "warning", "problem"]

MOST_AHEAD_S: Final = 5.0
"""How far a server's clock may be from ours. Storage refuses signatures that are a quarter of an hour off."""

DESCRIPTORS: Final = 1024
DESCRIPTORS_A_SERVER: Final = 8
MAPPINGS: Final = 65_530
"""What Linux allows a process unless told otherwise. The local lane maps segments."""

SHARED_BYTES: Final = 1 << 30
"""Of /dev/shm. What Docker gives unless told otherwise is 64 MiB."""

SHM: Final = "/dev/shm"  # noqa: S108 - looked at, not written
FREE_BYTES: Final = 1 << 30
EXPIRES_S: Final = 30 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: `about` which server, file or limit, what was seen, and what to do about it."""

    check: str
    about: str
    state: State
    what: str
    advice: str = ""


def clock(address: str, ahead_s: float, unsure_s: float) -> Finding:
    """`ahead_s` is the server's clock less ours, known to `unsure_s`."""
    off_s = max(0.0, abs(ahead_s) - unsure_s)
    if off_s <= MOST_AHEAD_S:
        return Finding(
            check="clock", about=address, state="ok", what=f"within {off_s + unsure_s:.2f} s of ours"
        )
    how = "ahead of" if ahead_s > 0 else "behind"
    return Finding(
        check="clock",
        about=address,
        state="warning",
        what=f"{off_s:.0f} s {how} ours",
        advice="run chrony or ntpd on both: certificates, S3's signatures and the times of checkpoints go by clocks",
    )


def versions(ours: str, theirs: Mapping[str, str]) -> Iterator[Finding]:
    """Of torchcache, by the servers' addresses."""
    for address, version in theirs.items():
        if version == ours:
            yield Finding(check="version", about=address, state="ok", what=version)
        else:
            yield Finding(
                check="version",
                about=address,
                state="warning",
                what=f"{version}, and here {ours}",
                advice="upgrade the servers one after the other, then the clients (docs/operations.md)",
            )


def limits(
    *, descriptors: tuple[int, int], servers: int, mappings: int | None, shared: tuple[int, int] | None
) -> Iterator[Finding]:
    """Of this process: soft and hard limit of descriptors, of mappings, and of /dev/shm all and free bytes."""
    soft, hard = descriptors
    wanted = max(DESCRIPTORS, DESCRIPTORS_A_SERVER * servers)
    few = 0 <= soft < wanted
    yield Finding(
        check="limits",
        about="open files",
        state="warning" if few else "ok",
        what=f"{soft} allowed" if soft >= 0 else "unlimited",
        advice=f"ulimit -n {min(hard, 65_536) if hard >= 0 else 65_536}, in the job's script" if few else "",
    )
    if mappings is not None:
        few = mappings < MAPPINGS
        yield Finding(
            check="limits",
            about="mappings",
            state="warning" if few else "ok",
            what=f"{mappings} allowed",
            advice=f"sysctl vm.max_map_count={MAPPINGS} on the host" if few else "",
        )
    if shared is None:
        yield Finding(
            check="limits",
            about=SHM,
            state="warning",
            what="there is none",
            advice="mount a tmpfs there: workers of a DataLoader hand batches over in it",
        )
        return
    small = shared[0] < SHARED_BYTES or shared[1] < SHARED_BYTES // 4
    yield Finding(
        check="limits",
        about=SHM,
        state="warning" if small else "ok",
        what=f"{size_text(shared[0])}, {size_text(shared[1])} of it free",
        advice="workers of a DataLoader hand batches over in it: docker run --shm-size=8g, or in Kubernetes an "
        "emptyDir of medium Memory there"
        if small
        else "",
    )


def token_file(
    path: str, *, mode: int, owner: int, me: int, text: str | None, read_only: bool = False
) -> Finding:
    """A client's; `text` None: it can't be read; `read_only`: its file system is."""

    def said(state: State, what: str, advice: str = "") -> Finding:
        return Finding(check="credentials", about=path, state=state, what=what, advice=advice)

    if text is None:
        return said(
            "problem",
            "the token file can't be read",
            f"chown {me} it, or name another by TORCHCACHE_TOKEN_FILE",
        )
    try:
        parse_tokens(text)
    except ConfigurationError:
        return said(
            "problem", "the file holds no token", "copy the servers' token there, in a line of its own"
        )
    if exposure(mode=mode, owner=owner, me=me, read_only=read_only) == "refused":
        return said("problem", "the token is open to others, and so isn't used", "chmod 600 it")
    if not stat.S_ISREG(mode) or owner != me or mode & 0o077:
        return said("warning", "others may read or have written the token", f"chmod 600, owned by user {me}")
    return said("ok", "a token that only its owner can read")


def certificate(path: str, ends: datetime, now: datetime) -> Finding:
    """A PEM file's certificate, by when it ends."""
    left_s = (ends - now).total_seconds()
    day = ends.astimezone(UTC).date().isoformat()
    advice = "make new ones: torchcache keygen, with the same authority, and copy them (docs/operations.md)"
    if left_s <= 0:
        return Finding(
            check="credentials", about=path, state="problem", what=f"it ended on {day}", advice=advice
        )
    state: State = "warning" if left_s < EXPIRES_S else "ok"
    return Finding(
        check="credentials",
        about=path,
        state=state,
        what=f"good until {day}",
        advice=advice if state == "warning" else "",
    )


def server_disk(server: ServerStatus) -> Finding:
    """The disk of a server's store, as it says itself."""

    def said(state: State, what: str, advice: str = "") -> Finding:
        return Finding(check="disk", about=server.address, state=state, what=what, advice=advice)

    if server.out_of_service:
        return said(
            "problem",
            f"out of service: {server.out_of_service}",
            "see TorchcacheDiskOutOfService in docs/operations.md",
        )
    if server.disk_errors:
        return said(
            "warning",
            f"{server.disk_errors} errors since it started",
            "look at dmesg and the drive's SMART data there",
        )
    held, free = size_text(server.used_bytes), size_text(server.free_bytes)
    return said("ok", f"{held} held of {size_text(server.capacity_bytes)}, {free} free")


def home_disk(path: str, free_bytes: int | None, *, writable: bool, holds_a_pool: bool) -> Finding:
    """TORCHCACHE_HOME. None free: it isn't there, and can't be made."""

    def said(state: State, what: str, advice: str = "") -> Finding:
        return Finding(check="disk", about=path, state=state, what=what, advice=advice)

    if free_bytes is None or not writable:
        what = "TORCHCACHE_HOME can't be written"
        advice = "set it to a folder on a local disk that this user may write"
        return said("problem" if holds_a_pool else "warning", what, advice)
    if holds_a_pool and free_bytes < FREE_BYTES:
        return said(
            "warning",
            f"only {size_text(free_bytes)} free for the embedded pool",
            "free some, or set TORCHCACHE_HOME",
        )
    return said("ok", f"{size_text(free_bytes)} free")
