"""The doctor of a client: whether this machine can use a pool, and what stands in its way."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from torchcache import environment
from torchcache.addresses import is_unix
from torchcache.cli import client_findings as findings
from torchcache.cli.client_findings import Finding
from torchcache.errors import ConfigurationError, ServerUnavailable, TorchCacheError
from torchcache.lanes.access import Access
from torchcache.pool.control import ControlClient
from torchcache.pool.health import far_slower
from torchcache.pool.members import Endpoint
from torchcache.wire.v1 import cache_pb2

if TYPE_CHECKING:
    from torchcache.pool.client import Pool

ASK_S: Final = 5.0
PACKAGES: Final = ("torch", "pyarrow", "grpcio", "protobuf", "lmdb")


class Met(NamedTuple):
    """A server as it was met: what it says of itself, or why it didn't."""

    endpoint: Endpoint
    info: Any = None
    error: TorchCacheError | None = None
    took_s: float = 0.0
    ahead_s: float = 0.0


def diagnose(pool: Pool) -> Iterator[Finding]:
    """Looks at one thing after the other; nothing is raised. An embedded pool is started, as it is by any use."""
    yield from _packages()
    access = pool.source.access
    yield from _credentials(access)
    try:
        endpoints = pool.source.resolve(deadline=time.monotonic() + 60)
    except TorchCacheError as error:
        yield Finding(
            check="servers", about=pool.address, state="problem", what=str(error), advice=_advice(error)
        )
        endpoints = ()
    met = [_meet(endpoint, access) for endpoint in endpoints]
    for one in met:
        yield from _reached(one, access)
    there = [one for one in met if one.info is not None]
    if there:
        yield from findings.versions(
            version("torchcache"), {m.endpoint.address: m.info.version for m in there}
        )
        yield from _in_use(pool)
    yield from _machine(pool, len(endpoints))


# ---- the servers ----


def _meet(endpoint: Endpoint, access: Access) -> Met:
    control = ControlClient(endpoint.address, access)
    try:
        control.call("GetInfo", cache_pb2.InfoRequest(), deadline=time.monotonic() + ASK_S)  # it connects
        began, asked = time.monotonic(), time.time()
        info = control.call("GetInfo", cache_pb2.InfoRequest(), deadline=time.monotonic() + ASK_S)
        took_s = time.monotonic() - began
    except TorchCacheError as error:
        return Met(endpoint, error=error)
    finally:
        control.close()
    return Met(endpoint, info, None, took_s, info.unix_s - (asked + took_s / 2) if info.unix_s else 0.0)


def _reached(met: Met, access: Access) -> Iterator[Finding]:
    address = met.endpoint.address
    if met.error is not None:
        kind = "credentials" if isinstance(met.error, ConfigurationError) else "reachability"
        advice = _why_unreachable(met.endpoint) if kind == "reachability" else _advice(met.error)
        yield Finding(check=kind, about=address, state="problem", what=met.error.message, advice=advice)
        return
    yield Finding(
        check="reachability", about=address, state="ok", what=f"answers in {1e3 * met.took_s:.1f} ms"
    )
    yield _scope(met.endpoint, access)
    if met.info.unix_s:
        yield findings.clock(address, met.ahead_s, met.took_s / 2)


def _scope(endpoint: Endpoint, access: Access) -> Finding:
    """Found out by what is refused: a write that nobody has begun is given up."""
    control = ControlClient(endpoint.address, access)
    request = cache_pb2.AbandonWriteRequest(write_id=secrets.token_hex(16))
    try:
        control.call("AbandonWrite", request, deadline=time.monotonic() + ASK_S)
        what = "the token is good for reading and writing"
    except ConfigurationError:
        what = "the token is good for reading alone: nothing computed is kept, and no checkpoint saved"
    except TorchCacheError as error:
        what = f"the token is good for reading; whether for writing can't be told: {error.message}"
    finally:
        control.close()
    return Finding(check="credentials", about=endpoint.address, state="ok", what=what)


def _why_unreachable(endpoint: Endpoint) -> str:
    """What a plain connection says of why."""
    if is_unix(endpoint.host):
        return _why_silent(endpoint.host)
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=2.0).close()
    except socket.gaierror:
        return f"the name {endpoint.host} isn't known here: look at its spelling and at DNS"
    except TimeoutError:
        return (
            "packets get no answer: is the machine up, and do firewalls let the port pass, and the next one?"
        )
    except ConnectionRefusedError:
        return "nobody listens there: does `torchcache serve` run, on that port, and not on loopback only?"
    except OSError as error:
        return f"the network says: {error.strerror or error}"
    return (
        "something listens there that doesn't answer as a server: does it hang (see 'A server that hangs or is slow' "
        "in docs/operations.md), is TLS on one side only, or is it the wrong port?"
    )


def _why_silent(path: str) -> str:
    """The same, of a Unix socket."""
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(2.0)
        try:
            plain.connect(path)
        except FileNotFoundError:
            return "there is no such socket: does `torchcache serve --listen unix://...` run, with that path?"
        except PermissionError:
            return "this user may not use the socket: a server's socket is for its own user"
        except ConnectionRefusedError:
            return "nobody listens there any more: start the server again"
        except OSError as error:
            return f"the kernel says: {error.strerror or error}"
    return "something listens there that doesn't answer as a server: does it hang, or is it another socket's path?"


def _in_use(pool: Pool) -> Iterator[Finding]:
    """The pool used as jobs use it: the lanes to its servers, how fast they answer there, and their disks."""
    try:
        status, answers_s, seen = pool.status(), pool.answers_s(), pool.statistics()
    except TorchCacheError as error:
        yield Finding(
            check="lanes", about=pool.address, state="problem", what=str(error), advice=_advice(error)
        )
        return
    slow = far_slower({address: took_s for address, took_s in answers_s.items() if took_s is not None})
    answering = {server.address for server in status}
    for address, lane in seen.lanes.items():
        if address not in answering:
            yield _says_nothing(address)
            continue
        yield _lane(
            address, lane, seen.lane_reasons.get(address, ""), answers_s.get(address), slow.get(address)
        )
    yield from map(findings.server_disk, status)


def _says_nothing(address: str) -> Finding:
    return Finding(
        check="lanes",
        about=address,
        state="problem",
        what="it has said who it is, but doesn't say how it is",
        advice="it hangs, or has just ended: see 'A server that hangs or is slow' in docs/operations.md",
    )


def _lane(address: str, lane: str, reason: str, took_s: float | None, times: float | None) -> Finding:
    if lane == "flight" and took_s is None:
        advice = "the data port is the one behind the control port: let both pass"
        what = "the control port answers, the data port doesn't"
        return Finding(check="lanes", about=address, state="problem", what=what, advice=advice)
    what = lane if took_s is None else f"{lane}, {1e3 * took_s:.1f} ms"
    what += f"; not local: {reason}" if reason else ""
    if times is None:
        return Finding(check="lanes", about=address, state="ok", what=what)
    what += f"; {times:.0f} times as long as the others"
    advice = "reads pass over it: see 'A server that hangs or is slow' in docs/operations.md"
    return Finding(check="lanes", about=address, state="warning", what=what, advice=advice)


# ---- this machine ----


def _packages() -> Iterator[Finding]:
    found = [f"torchcache {version('torchcache')}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            pass
    yield Finding(check="version", about="here", state="ok", what=", ".join(found))


def _credentials(access: Access) -> Iterator[Finding]:
    path = access.token_file
    if path is not None:
        yield _token_file(path)
    tls = access.tls
    for file in (tls.ca, tls.certificate) if tls is not None else ():
        if file is not None:
            yield _certificate(str(file))


def _token_file(path: Path) -> Finding:
    try:
        found = path.stat()
    except OSError as error:
        advice = "set TORCHCACHE_TOKEN_FILE to a copy of the servers' token"
        what = f"there is no token: {error.strerror}"
        return Finding(check="credentials", about=str(path), state="problem", what=what, advice=advice)
    try:
        text: str | None = path.read_text(errors="replace")
    except OSError:
        text = None
    return findings.token_file(
        str(path),
        mode=found.st_mode,
        owner=found.st_uid,
        me=os.geteuid(),
        text=text,
        read_only=bool(os.statvfs(path).f_flag & os.ST_RDONLY),
    )


def _certificate(path: str) -> Finding:
    try:
        from cryptography import x509
    except ImportError:
        what = "not looked at: pip install 'torchcache[tls]'"
        return Finding(check="credentials", about=path, state="ok", what=what)
    try:
        found = x509.load_pem_x509_certificate(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        advice = "give the PEM files that torchcache keygen made"
        return Finding(check="credentials", about=path, state="problem", what=str(error), advice=advice)
    return findings.certificate(path, found.not_valid_after_utc, datetime.now(UTC))


def _machine(pool: Pool, servers: int) -> Iterator[Finding]:
    shm = Path(findings.SHM)
    shared = shutil.disk_usage(shm) if shm.is_dir() else None
    try:
        mappings: int | None = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        mappings = None
    yield from findings.limits(
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE),
        servers=servers,
        mappings=mappings,
        shared=None if shared is None else (shared.total, shared.free),
    )
    home = environment.home().expanduser().absolute()
    nearest = next(path for path in (home, *home.parents) if path.exists())
    yield findings.home_disk(
        str(home),
        shutil.disk_usage(nearest).free,
        writable=os.access(nearest, os.W_OK | os.X_OK),
        holds_a_pool=pool.source.embedded,
    )


def _advice(error: TorchCacheError) -> str:
    """Errors of ours say what to do themselves, but for those of who isn't there."""
    return (
        "look at whether it runs, and at the network between" if isinstance(error, ServerUnavailable) else ""
    )
