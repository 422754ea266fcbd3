"""Whether gRPC works in this process at all, found out without hanging or crashing."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import time
from typing import Final

import grpc
import pyarrow as pa
import pyarrow.flight as fl

from torchcache.wire.v1 import cache_pb2, cache_pb2_grpc

PROBE_S: Final = 5.0
_NOBODY: Final = ("127.0.0.1", 1)
"""Loopback's port 1, where nobody listens: a working gRPC says so in a millisecond."""


def grpc_works(wait_s: float = PROBE_S) -> bool:
    """Tries a call with grpcio and one with Flight, each of which brings a gRPC of its own.

    In a child: where gRPC came through a fork alive, a call may hang for ever, and was seen to crash.
    """
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()  # a crash here is an answer: no traceback, no core
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _call_control()
            _call_flight()
            os._exit(0)
        finally:
            os._exit(1)
    return _exit_status(pid, time.monotonic() + wait_s) == 0


def _exit_status(pid: int, deadline: float) -> int | None:
    """How the child ended; None if it had to be killed at the deadline, or was waited for by somebody else."""
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        pass
    return None


def _call_control() -> None:
    with grpc.insecure_channel(f"{_NOBODY[0]}:{_NOBODY[1]}") as channel:
        try:
            cache_pb2_grpc.ControlStub(channel).GetInfo(cache_pb2.InfoRequest(), timeout=1.0)  # type: ignore[no-untyped-call]
        except grpc.RpcError:
            pass


def _call_flight() -> None:
    client = fl.FlightClient(fl.Location.for_grpc_tcp(*_NOBODY))
    try:
        client.do_get(fl.Ticket(b""), fl.FlightCallOptions(timeout=1.0))
    except pa.ArrowException:
        pass
    finally:
        client.close()
        del client
