"""Clients that are gone without a word (F17): the kernel asks after them, on both ports."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Final

import pytest

from tests.integration.server_process import ServerProcess

KEEPALIVE: Final = "02"
"""What the kernel's table says of a connection that it will ask for a sign of life."""


def timer(server: ServerProcess, port: int, peer: int) -> str:
    """What the kernel waits for at the server's end of a connection; "" while there is none."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, _, _, waits, *_ = line.split()
            if [int(address.rpartition(":")[2], 16) for address in (local, remote)] == [port, peer]:
                return waits.partition(":")[0]
    return ""


@pytest.mark.parametrize("which", ["control", "data"])
def test_the_kernel_asks_after_a_peer_that_says_nothing(tmp_path: Path, home: Path, which: str) -> None:
    (tmp_path / "source").mkdir()
    arguments = ("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB")
    source = ("--under-store", f"file=file://{tmp_path}/source")
    with ServerProcess(*arguments, *source, token_file=home / "token") as server:
        port = server.data_port if which == "data" else int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            deadline = time.monotonic() + 60
            while timer(server, port, client.getsockname()[1]) != KEEPALIVE:
                assert time.monotonic() < deadline, "the server waits for it for ever"
                time.sleep(0.05)
