"""Several servers as child processes: started together, started again when one dies, stopped together.

A server that dies takes nothing with it: the others serve on, and it is started again on its store, after a pause
that doubles while it doesn't last. One that can't start in the beginning ends all, so that a mistake shows at once and
not as a pool with a hole. Servers are told to stop by a signal, or by the end of their standard input, which also comes
if this process is killed.
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, Literal

from .config import ServerConfig
from .exit_codes import INCOMPLETE, OK
from .several import arguments, folder, left_out, split

FIRST_PAUSE_S: Final = 1.0
MOST_PAUSE_S: Final = 30.0
LASTED_S: Final = 60.0
"""A server that ran so long begins with the shortest pause again."""

READY: Final = re.compile(r"torchcache server \S+ listening on (\S+) ")

_LOG = logging.getLogger(__name__)


class _Server:
    """One server, over its lives."""

    def __init__(self, number: int, config: ServerConfig, events: SimpleQueue[_Event]) -> None:
        self.name = folder(number)
        self.address: str | None = None  # once it listened
        self.process: subprocess.Popen[str] | None = None  # while it runs
        self._config = config
        self._events = events
        self._started = 0.0
        self._pause_s = 0.0

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "torchcache_server", "--supervised", *arguments(self._config)]
        self._started = time.monotonic()
        # In a session of its own: what a terminal sends to all is for the supervisor, who tells them once.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            umask=-1 if self._config.umask is None else self._config.umask,
        )
        threading.Thread(target=self._follow, args=(self.process,), name=self.name, daemon=True).start()

    def start_later(self) -> float:
        """Starts it again after a pause; returns the seconds."""
        if time.monotonic() - self._started > LASTED_S:
            self._pause_s = 0.0
        self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S) or FIRST_PAUSE_S
        timer = threading.Timer(self._pause_s, self._events.put, (_Event("start", self),))
        timer.daemon = True
        timer.start()
        return self._pause_s

    def stop(self) -> None:
        """Tells it to drain and end; tells it again to end at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def _follow(self, process: subprocess.Popen[str]) -> None:
        """Passes on what it says, until its end."""
        with process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                if ready := READY.match(line):
                    self.address = ready[1]
                    self._events.put(_Event("ready", self))
        self._events.put(_Event("ended", self, process.returncode))


@dataclass(frozen=True)
class _Event:
    kind: Literal["ready", "ended", "start", "stop"]
    server: _Server | None = None
    code: int = 0


class Supervisor:
    """Runs the servers of one configuration."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigurationError if it can't be split."""
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._servers = [_Server(i, one, self._events) for i, one in enumerate(split(config))]
        self._code = OK
        self._stopping = False
        self._up = False  # once all were ready
        for store in left_out(config.store, config.servers):
            _LOG.warning(
                "%s is the store of no server now: what it holds that is in no under-store stays there, until it is "
                "served again",
                store,
            )

    def run(self, stop: threading.Event) -> int:
        """Until `stop` is set and all have drained, or one can't start; returns the exit code: the worst of theirs."""

        def pass_on() -> None:
            stop.wait()
            self._events.put(_Event("stop"))

        threading.Thread(target=pass_on, name="stop", daemon=True).start()
        for server in self._servers:
            server.start()
        while not (self._stopping and all(server.process is None for server in self._servers)):
            self._handle(self._events.get())
        return self._code

    def _handle(self, event: _Event) -> None:
        server = event.server
        if server is None:
            self._stop()
        elif event.kind == "ready":
            self._note_ready()
        elif event.kind == "start":
            if not self._stopping:
                self._start_again(server)
        else:
            server.process = None
            self._note_end(server, event.code)

    def _start_again(self, server: _Server) -> None:
        try:
            server.start()
        except OSError as error:  # no process to be had
            _LOG.error(
                "%s can't be started: %s; tried again in %g s", server.name, error, server.start_later()
            )

    def _note_ready(self) -> None:
        addresses = [server.address for server in self._servers if server.address]
        if not self._up and len(addresses) == len(self._servers):
            self._up = True
            print(f"torchcache pool of {len(addresses)} servers: {','.join(addresses)}", flush=True)

    def _note_end(self, server: _Server, code: int) -> None:
        if self._stopping:
            self._code = max(self._code, code if code >= 0 else INCOMPLETE)
        elif not self._up:
            _LOG.error("%s could not start (%s): all are stopped", server.name, _ending(code))
            self._code = code if code > 0 else INCOMPLETE
            self._stop()
        else:
            pause_s = server.start_later()
            _LOG.error("%s ended (%s): it is started again in %g s", server.name, _ending(code), pause_s)

    def _stop(self) -> None:
        self._stopping = True
        for server in self._servers:
            if server.process is None:  # it died and has not drained
                self._code = max(self._code, INCOMPLETE)
            server.stop()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def supervise(config: ServerConfig, stop: threading.Event) -> int:
    """Runs `config.servers` servers until `stop` is set. Returns the exit code; see `Supervisor.run`."""
    return Supervisor(config).run(stop)
