"""`python -m torchcache_server`: a server, from its start to its drained end.

Exit codes: see exit_codes.py. Several servers (`--servers`) are child processes of one that supervises them.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.heap import keep_freed_memory, share_heaps
from torchcache.locks import LockFile
from torchcache_server.service.draining import Draining

from . import logs
from .config import Embedded, ServerConfig, from_settings, parse_under_stores, read_toml
from .exit_codes import INCOMPLETE, OK, REFUSED
from .life import Ending
from .logs import FORMATS, LEVELS
from .presence import POLL_S, clients_present, wait_until_idle
from .server import Server
from .supervisor import supervise

LOG_BYTES: Final = 1024 * 1024
CLOSE_S: Final = 30.0
"""After the drain the process ends within this, whatever some thread may wait for."""

PREDECESSOR_S: Final = 40.0
"""How long an embedded server waits for the one before it to be gone."""

_LOG = logging.getLogger(__name__)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--listen",
    metavar="HOST:PORT|unix:///PATH",
    help="Control port; data is served on the port behind it. Or a Unix socket, for this user alone. [127.0.0.1:7440]",
)
@click.option(
    "--store", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the cache, best on local NVMe."
)
@click.option("--capacity", metavar="SIZE", help="How much the store may hold, like 100GB or 64GiB.")
@click.option(
    "--under-store",
    "under_store",
    metavar="NAME=URI",
    multiple=True,
    help="A source, like s3=s3:// or data=file:///data. Repeatable.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML file with the same settings; options win.",
)
@click.option(
    "--token-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Secret of the pool, mode 0600; made if missing.",
)
@click.option(
    "--tls-cert",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Certificate, PEM. Needed off loopback.",
)
@click.option("--tls-key", metavar="FILE", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option(
    "--tls-client-ca",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Serve only clients with a certificate by this authority, PEM.",
)
@click.option(
    "--drain-s", metavar="SECONDS", type=float, help="How long to go on uploading after SIGTERM. [60]"
)
@click.option(
    "--lease-s",
    metavar="SECONDS",
    type=float,
    help="Who saves a checkpoint, or uploads it, and is silent for three times as long may be taken for dead. The same "
    "for all servers of a pool. [10]",
)
@click.option(
    "--max-pending",
    metavar="SIZE",
    help="With so much of checkpoints not uploaded yet, no further save is begun. [three quarters of the capacity]",
)
@click.option("--metrics-port", metavar="PORT", type=int, help="Prometheus metrics.")
@click.option(
    "--metrics-host",
    metavar="HOST",
    help="Where they are served; off loopback over TLS, as --tls-cert and the others say, for who brings a token. "
    "[127.0.0.1]",
)
@click.option(
    "--metrics-insecure",
    is_flag=True,
    default=None,
    help="Serve metrics off loopback in the clear, to everybody who reaches them.",
)
@click.option(
    "--scrub-rate",
    metavar="SIZE",
    help="How much of the store to verify each second, in the background; 0: none. [32MiB]",
)
@click.option(
    "--min-free",
    metavar="SIZE",
    help="What is to stay free on the store's file system, like 10GB; 0: nothing.",
)
@click.option(
    "--join", metavar="etcd://HOST:PORT/NAME", help="Announce the server in etcd, in the pool of that NAME."
)
@click.option(
    "--advertise", metavar="HOST", help="With --join: how others reach this machine. [--listen's host]"
)
@click.option(
    "--pool",
    metavar="ADDRESS",
    help="All servers of the pool, as clients name them, like host:7440,host:7440: a checkpoint that isn't uploaded "
    "yet is copied again when a server that holds it is lost, and mended from another when it is damaged here. "
    "[--join's]",
)
@click.option(
    "--weight",
    metavar="FACTOR",
    type=float,
    help="How much of the pool to take, beside what --capacity gives it: 0.5 takes half of that. [1]",
)
@click.option(
    "--servers",
    metavar="N",
    type=int,
    help="Servers to run on this machine, each with a folder of --store, a share of --capacity, and two ports counted "
    "up from --listen's. One that dies is started again. [1]",
)
@click.option(
    "--log-format",
    metavar="|".join(FORMATS),
    help="What the log on stderr consists of: lines for people, or a JSON object a line. [text]",
)
@click.option(
    "--log-level",
    metavar="|".join(LEVELS),
    help="What the log tells: debug, also each call and each fetch from an under-store; warning, only what may need "
    "somebody. [info]",
)
@click.option("--supervised", is_flag=True, hidden=True, help="End when standard input does.")
@click.option(
    "--embedded",
    metavar="ROOT",
    type=click.Path(path_type=Path),
    help="Run as a server of the embedded pool in ROOT.",
)
@click.option("--index", metavar="I", type=int, help="Number of this server in the embedded pool.")
@click.option(
    "--idle-s", metavar="SECONDS", type=float, help="Embedded: end after so long without a client. [15]"
)
def main(*, config: Path | None, under_store: tuple[str, ...], supervised: bool, **options: Any) -> None:
    """A torchcache server: holds chunks of datasets and checkpoints on local disk and serves them to a pool's clients.

    SIGTERM stops it: it finishes what runs and uploads what is not yet in the under-store, then says what is left.
    """
    umask = os.umask(0o077)  # what the server writes for itself is for nobody else
    settings: dict[str, Any] = {}
    try:
        settings |= read_toml(config) if config else {}
        settings |= {name: value for name, value in options.items() if value is not None}
        if under_store:
            settings["under_stores"] = parse_under_stores(under_store)
        sys.exit(run(replace(from_settings(settings), umask=umask), supervised=supervised))
    except (TorchCacheError, OSError) as error:
        if settings.get("log_format") == "json":
            logs.configure("json", logs.DEFAULT_LEVEL)
            _LOG.error("can't start: %s", error)
        else:
            click.echo(f"torchcache server: {error}", err=True)
        sys.exit(REFUSED)


def run(config: ServerConfig, *, supervised: bool = False) -> int:
    """Runs a server until it is told to stop, or, embedded, until nobody needs it. Returns the exit code.

    Raises TorchCacheError or OSError if it can't start.
    """
    stop = _stop_on_signals()
    if supervised:
        _stop_with_supervisor(stop)
    if config.servers > 1:
        logs.configure(config.log_format, config.log_level)
        return supervise(config, stop)
    _raise_descriptor_limit()
    keep_freed_memory()
    share_heaps()
    if config.embedded is None:
        return _serve(config, stop, _draining(stop, supervised=supervised))
    with _own_folder(config.embedded):
        return _serve(config, stop, Draining(instead="it ends when nobody uses the embedded pool any more"))


def _draining(stop: threading.Event, *, supervised: bool) -> Draining:
    if supervised:
        return Draining(
            instead="it is one of `--servers`, and would be started again; send SIGTERM to the process that runs them"
        )
    return Draining(stop.set)


def _serve(config: ServerConfig, stop: threading.Event, draining: Draining) -> int:
    log = logs.configure(config.log_format, config.log_level)
    server = Server(config, draining=draining)
    log.server = server.server_id
    gc.collect()
    gc.freeze()  # what was imported stays: the collector need not walk it again and again while batches are made
    try:
        server.say_started()  # before those who wait for the next line look for it
        print(
            f"torchcache server {server.server_id} listening on {server.control_address} (data {server.data_place})",
            flush=True,
        )
        if config.embedded is None:
            stop.wait()
            ending = Ending("told to stop", config.drain_s)
            left = server.drain(config.drain_s)
        else:
            root, idle_s = config.embedded.root, config.embedded.idle_s
            wait_until_idle(root, stop, server.leave, idle_s=idle_s, poll_s=min(POLL_S, idle_s / 5))
            ending = Ending("told to stop" if stop.is_set() else "nobody uses it any more", config.drain_s)
            # Who attaches now starts the next server, which waits for this one: it takes over the uploads.
            left = server.drain(config.drain_s, abandoned=lambda: clients_present(root))
    except BaseException:
        server.close()
        raise
    ending.drained(left)
    code = INCOMPLETE if left else OK
    watchdog = threading.Timer(CLOSE_S, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()
    closed = server.close()
    ending.ended(code)
    if not closed:
        os._exit(code)  # everything of ours is closed; a thread inside gRPC would not let the process end
    return code


def _own_folder(embedded: Embedded) -> LockFile:
    """The folder of an embedded server, locked for its life, with stdout and stderr going to its log."""
    embedded.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = embedded.folder / "server.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    lock = LockFile(embedded.folder / "server.lock")
    if not lock.wait_exclusive(PREDECESSOR_S):
        lock.close()
        raise ConfigurationError(f"another server runs in {embedded.folder} and doesn't end: stop it first")
    return lock


def _stop_on_signals() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once. `torchcache drain` sets it too.

    The kernel may hand a signal to any of gRPC's threads, and then nothing wakes the main thread, in which Python runs
    its handlers, out of a wait. The wakeup descriptor is written wherever the signal lands.
    """
    stop = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)

    def watch() -> None:
        signals = 0
        while number := os.read(reading, 1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            signals += 1
            if signals > 1:
                os._exit(INCOMPLETE)
            stop.set()

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return stop


def _stop_with_supervisor(stop: threading.Event) -> None:
    """Sets `stop` when the supervisor is gone, however it went: its end of the pipe closes."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        if stop.is_set():  # the supervisor was told twice
            os._exit(INCOMPLETE)
        stop.set()

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def _raise_descriptor_limit() -> None:
    """Every segment is mapped and every connection is a descriptor: 1024, the usual soft limit, is few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
