"""Forks servers off an interpreter that has imported all of one: the rest of a start takes 60 ms instead of 600.

Argument: the descriptor of a SOCK_SEQPACKET socket. Each message is the JSON list of a server's arguments, and comes
with the descriptors of its stdout and stderr; the answer is its pid. Dead servers are reaped at the next message.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as in torchcache_server.__main__

from torchcache_server.process.main import main as serve

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    orders = socket.socket(fileno=descriptor)
    orders.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, 1 << 16, 2)
        if not message:
            return
        _reap()
        pid = os.fork()
        if pid == 0:
            orders.close()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for target, given in enumerate(descriptors, start=1):
                os.dup2(given, target)
                os.close(given)
            serve(json.loads(message), prog_name="torchcache serve")
        for given in descriptors:
            os.close(given)
        orders.send(str(pid).encode())


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
