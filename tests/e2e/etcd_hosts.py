"""An etcd of several members, each on a host of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.integration.own_network import Host
from tests.waiting import until

ETCD_PORT, _PEER_PORT = 2379, 2380
_ASK: Final = (
    "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], data=b'{}', timeout=5).read().decode())"
)


class EtcdHosts:
    """Members that run from `start` on; their data is on their hosts' disks. Context manager."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self._hosts = hosts
        self._folder = folder
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def address(self, pool: str) -> str:
        """What a pool of that name is connected to by."""
        return f"etcd://{','.join(f'{host.address}:{ETCD_PORT}' for host in self._hosts)}/{pool}"

    def __enter__(self) -> EtcdHosts:
        try:
            for number in range(len(self._hosts)):
                self.start(number)
            self.leader()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for number in list(self._running):
            self.kill(number)

    def start(self, number: int) -> None:
        host = self._hosts[number]
        url, peer = (f"http://{host.address}:{port}" for port in (ETCD_PORT, _PEER_PORT))
        all_peers = (f"e{n}=http://{one.address}:{_PEER_PORT}" for n, one in enumerate(self._hosts))
        command = [
            *("etcd", "--name", f"e{number}", "--data-dir", str(host.disk / "data")),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(all_peers)),
            *("--heartbeat-interval", "250", "--election-timeout", "2500"),  # for a machine that is busy
        ]
        with (self._folder / f"etcd-{number}.log").open("ab") as log:
            self._running[number] = subprocess.Popen([*host.through, *command], stdout=log, stderr=log)

    def kill(self, number: int) -> None:
        """kill -9; its data stays."""
        process = self._running.pop(number)
        process.kill()
        process.wait()

    def leader(self) -> int:
        """The member that the others follow, once there is one."""
        found: list[int] = []

        def elected() -> bool:
            says = {number: self._status(number) for number in self._running}
            leaders = {leader for _, leader in says.values()}
            found[:] = [number for number, (own, _) in says.items() if leaders == {own} != {""}]
            return bool(found)

        until(elected)
        return found[0]

    def _status(self, number: int) -> tuple[str, str]:
        """The ids of a member and of whom it takes for the leader; empty if it doesn't say."""
        host = self._hosts[number]
        url = f"http://{host.address}:{ETCD_PORT}/v3/maintenance/status"
        try:
            said = json.loads(host.run(sys.executable, "-I", "-S", "-c", _ASK, url))
        except subprocess.CalledProcessError:
            return "", ""
        return said["header"]["member_id"], said.get("leader", "")
