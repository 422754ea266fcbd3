"""Servers that are started and killed over and over on one store, and what their store looks like from outside."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO

READY = re.compile(r"torchcache server (\S+) listening on (\S+) \(data (\S+)\)\n")
"""What a server that serves says on stdout: its id, its address, and its data port."""

ROOT = Path(__file__).parents[2]
START_S = 120.0
PAGE = os.sysconf("SC_PAGE_SIZE")


def environment() -> dict[str, str]:
    """For a program of the tests, wherever it runs."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "server")])
    return {**os.environ, "PYTHONPATH": path, "GRPC_VERBOSITY": "NONE"}


class Life:
    """One server process, from its start to its end. `log` is its stderr."""

    def __init__(self, pid: int, stdout: int, log: Path, reap: Callable[[], int | None]) -> None:
        self.pid = pid
        self.log = log
        self._pidfd = os.pidfd_open(pid)
        self._stdout = stdout
        self._reap = reap

    def wait_ready(self) -> str:
        """Until it serves: its address."""
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self._stdout], [], [], START_S)
            got = os.read(self._stdout, 4096) if readable else b""
            if not got:
                raise AssertionError(f"the server did not start: {line!r}\n{self.log.read_text()[-3000:]}")
            line += got
        match = READY.fullmatch(line.decode())
        assert match, line
        return match[2]

    @property
    def alive(self) -> bool:
        return not select.select([self._pidfd], [], [], 0)[0]

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def end(self, number: signal.Signals = signal.SIGKILL, timeout_s: float = 120) -> int | None:
        """Signals it, and returns once it is gone, locks and all; its exit code, where that is known."""
        if self._pidfd < 0:
            return None
        self.send(number)
        gone, _, _ = select.select([self._pidfd], [], [], timeout_s)
        assert gone, f"the server {self.pid} does not end by signal {number}"
        os.close(self._pidfd)
        os.close(self._stdout)
        self._pidfd = -1
        return self._reap()


class PlainStarter:
    """Starts each server as `python -m torchcache_server`, or another module with arguments `first`.

    `through` is what stands before the command.
    """

    def __init__(
        self, *, module: str = "torchcache_server", through: Sequence[str] = (), first: Sequence[str] = ()
    ) -> None:
        self._command = [*through, sys.executable, "-m", module, *first]

    def __enter__(self) -> PlainStarter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, arguments: Sequence[str], log: Path) -> Life:
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [*self._command, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(),
            )
        assert process.stdout is not None
        stdout = os.dup(process.stdout.fileno())
        process.stdout.close()
        return Life(process.pid, stdout, log, process.wait)


class ForkingStarter:
    """Forks each server off a process that has done the imports, which are nine tenths of a start."""

    def __enter__(self) -> ForkingStarter:
        self._lock = threading.Lock()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.store_starter", str(theirs.fileno())],
                cwd=ROOT,
                env=environment(),
                pass_fds=[theirs.fileno()],
            )
        self._orders.settimeout(START_S)
        assert self._orders.recv(64) == b"ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orders.close()
        self._process.wait(START_S)

    def start(self, arguments: Sequence[str], log: Path) -> Life:
        """As PlainStarter does, also in the environment of just now."""
        read, write = os.pipe()
        with log.open("ab") as stderr:
            pid = self.fork(arguments, [write, stderr.fileno()])
        os.close(write)
        return Life(pid, read, log, lambda: self.exit_code(pid))

    def fork(
        self,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Starts a server whose stdout and stderr are the `descriptors`, with `more` in its environment; its pid."""
        return self._ordered(
            {"start": list(arguments), "environment": {**environment(), **more}}, descriptors
        )

    def exit_code(self, pid: int) -> int:
        """Of a server that has ended. May be asked for once."""
        return self._ordered({"ended": pid})

    def _ordered(self, order: Mapping[str, object], descriptors: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors)
            return int(self._orders.recv(64))


Starter = PlainStarter | ForkingStarter


def forking() -> ForkingStarter:
    """One for all tests of this process, which it doesn't outlive."""
    with _starting:  # the first servers may be started by several threads at once
        return _forking_of(os.getpid())


_starting = threading.Lock()


@functools.cache
def _forking_of(pid: int) -> ForkingStarter:
    ending = ExitStack()
    atexit.register(ending.close)
    return ending.enter_context(ForkingStarter())


class ForkedServer:
    """A server of `forking`'s, with what tests need of a Popen. Unlike one of that it doesn't outlive their process."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdout: int,
        stderr: int,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.pid = forking().fork(arguments, [stdout, stderr], more)
        self._pidfd = os.pidfd_open(self.pid)
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired("torchcache_server", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self._exit_code is None and select.select([self._pidfd], [], [], timeout_s)[0]:
            self._exit_code = forking().exit_code(self.pid)
            os.close(self._pidfd)
        return self._exit_code


class Child:
    """Another program of the tests, told what to do line by line, and answering each with a line of JSON.

    `through` is what stands before its command.
    """

    def __init__(self, module: str, job: object, *, through: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*through, sys.executable, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        self._buffer = b""
        self._send(job)

    def ask(self, order: object, timeout_s: float) -> dict[str, object]:
        """Sends an order and waits for the answer. A child that takes longer is a failure: I4."""
        self._send(order)
        return self.answer(timeout_s, order)

    def answer(self, timeout_s: float, order: object) -> dict[str, object]:
        stdout = _pipe(self.process.stdout)
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([stdout], [], [], timeout_s)
            got = os.read(stdout.fileno(), 1 << 16) if readable else b""
            if not got:
                raise AssertionError(f"no answer to {order!r} within {timeout_s} s")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, object] = json.loads(line)
        return answer

    def _send(self, order: object) -> None:
        stdin = _pipe(self.process.stdin)
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()

    def end(self) -> None:
        """Lets it end in good order, as it does when there are no more orders."""
        try:
            self.process.communicate(timeout=START_S)
        except subprocess.TimeoutExpired:
            self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


@dataclass(frozen=True)
class OnDisk:
    """What lies in a store's folder: the pages its segments end in, and every file that no store should have."""

    segments: int
    least_bytes: int
    most_bytes: int
    strange: list[str]

    def fits(self, used_bytes: int) -> bool:
        """Whether `used_bytes`, from headers to tails, is what lies there, to the page that each tail is in."""
        return self.least_bytes <= used_bytes <= self.most_bytes


def on_disk(store: Path, *, older_than_ns: int) -> OnDisk:
    """`older_than_ns`: a temporary or spare file last changed before that was left by an earlier server."""
    least = most = segments = 0
    strange = []
    for path in store.rglob("*"):
        try:
            if path.is_dir():
                continue
            relative = path.relative_to(store)
            if path.suffix == ".segment" and relative.parts[0] == "segments":
                end = data_end(path)
                segments, least, most = segments + 1, least + max(0, end - PAGE), most + end
            elif _passing(relative):
                if path.stat().st_ctime_ns < older_than_ns:
                    strange.append(f"{relative} (left behind)")
            elif not _expected(relative):
                strange.append(str(relative))
        except FileNotFoundError:  # went meanwhile
            continue
    return OnDisk(segments, least, most, strange)


def _passing(path: Path) -> bool:
    return path.suffix == ".tmp" or path.parts[0] == "spares"


def _expected(path: Path) -> bool:
    if path.parts[0] in ("records", "flags"):
        return path.suffix == ".record"
    index = ("index/data.mdb", "index/lock.mdb")
    return str(path) in ("store.json", "store-copy.json", "store.lock", *index)


def data_end(path: Path) -> int:
    """End of the last data of a file, to the page."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at = end = 0
        size = os.fstat(fd).st_size
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # a hole to the end
                break
            end = at = os.lseek(fd, start, os.SEEK_HOLE)
        return end
    finally:
        os.close(fd)
