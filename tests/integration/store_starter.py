"""Forks servers off an interpreter that has imported all of one: the rest of a start takes 60 ms instead of 600.

Argument: the descriptor of a SOCK_SEQPACKET socket. A message is JSON. `start`, a server's arguments, and `environment`
come with the descriptors of its stdout and stderr, and the answer is its pid; that to `ended`, the pid of one that has
ended, is its exit code. The others' are kept until somebody asks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as in torchcache_server.__main__

from torchcache_server.process.main import main as serve

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    orders = socket.socket(fileno=descriptor)
    orders.send(b"ready")
    ended: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, 1 << 18, 2)
        if not message:
            return
        ended.update(_reaped())
        order = json.loads(message)
        if "ended" in order:
            pid = order["ended"]
            if pid not in ended:  # it is said to have ended while its last threads still go
                ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            orders.send(str(ended.pop(pid)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            orders.close()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for target, given in enumerate(descriptors, start=1):
                os.dup2(given, target)
                os.close(given)
            os.environ.clear()
            os.environ.update(order["environment"])
            serve(order["start"], prog_name="torchcache serve")
        for given in descriptors:
            os.close(given)
        orders.send(str(pid).encode())


def _reaped() -> Iterator[tuple[int, int]]:
    """Pids and exit codes of those that have ended since the last time."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
