"""A pool on hosts of its own, in network namespaces: whatever becomes of them, bytes are right and calls end (I1, I4).

The figures that are published are what a reader notices. What they are to be is in tests/reliability_report.py: the
report says whether they are, no test does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from examples.etcd import Etcd
from examples.seaweedfs import environment
from tests.e2e.hosts import (
    DATA_PORT,
    PORT,
    S3_PORT,
    ClientHost,
    Cluster,
    ServerHost,
    client_variables,
    make_keys,
    server_arguments,
)
from tests.integration.own_mounts import fill_up
from tests.integration.own_network import OwnNetwork, why_no_networks
from tests.integration.self_describing import content
from tests.proofs import proof
from tests.proxy import Fault
from tests.waiting import until

MIB = 1 << 20
SMALL = {f"{number:03d}": 40_000 for number in range(60)}
BATCH = 8
READ_S = 60.0
STALLED_S = 4.0
TRANSIENT = {"ServerUnavailable", "DeadlineExceeded", "Overloaded"}
CALLS, SLOW_CALLS = 300, 1000
TIMES = 100
"""How much slower the slow server is."""

hosts_only = pytest.mark.skipif(bool(why_no_networks()), reason=why_no_networks())
etcd_too = pytest.mark.skipif(not Etcd.installed(), reason="no etcd here: apt-get install etcd-server")


@hosts_only
def test_a_server_on_another_host(tmp_path: Path) -> None:
    """F17, I1, I4: over TLS; then its cable is pulled, which is a typed error in time, and plugged in again."""
    source = tmp_path / "source" / "small"
    source.mkdir(parents=True)
    for name, size in SMALL.items():
        (source / name).write_bytes(content(f"small/{name}", 0, size))
    keys = tmp_path / "keys"
    with OwnNetwork() as network:
        host, other = (network.add(number, tmp_path / f"disk-{number}") for number in (10, 50))
        make_keys(keys, [host.address])
        more = [*server_arguments(keys), "--under-store", f"file=file://{source.parent}"]
        server = ServerHost(host, tmp_path / "log", more, {})
        server.launch()
        client = None
        try:
            client = ClientHost(other, client_variables(f"{host.address}:{PORT}", keys, tmp_path / "home"))
            server.life.wait_ready()
            assert client.tell("know", folder=f"file://{source}")["count"] == len(SMALL)
            assert_right(client.tell("read", folder="small", timeout_s=READ_S))
            with server.unplugged():
                found = client.tell("read", folder="small", timeout_s=2.0)
                assert not found["late"]
                assert sum(found["errors"].values()) == len(SMALL)
                assert found["errors"].keys() <= TRANSIENT
            wait_until_right(client, "small")
        finally:
            if client is not None:
                client.close()
            server.end()


# ---- four servers, etcd of three members, storage, two clients ----


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        cluster.put("small", SMALL)
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[ClientHost]:
    """A new one, that knows the objects and has read them; all servers are well."""
    with cluster.client(0) as client:
        know(cluster, client)
        cluster.wait_for_all(client)
        yield client


def know(cluster: Cluster, client: ClientHost) -> None:
    assert client.tell("know", folder=f"s3://{cluster.bucket}/small")["count"] == len(SMALL)
    assert_right(client.tell("read", folder="small", timeout_s=READ_S))


def assert_right(found: dict[str, Any]) -> None:
    """Calls brought all that they were for, in time (I1, I4)."""
    assert (found["wrong"], found["errors"], found["late"]) == ([], {}, [])


def wait_until_right(client: ClientHost, folder: str) -> None:
    """Until errors are over; wrong bytes there may never be."""

    def right() -> bool:
        found = client.tell("read", folder=folder, timeout_s=READ_S)
        assert not found["wrong"] and not found["late"]
        return not found["errors"]

    until(right)


def reads(client: ClientHost) -> None:
    """From now on at random, one call after the other; `CALLS` of them are done."""
    client.tell("go", folder="small", batch=BATCH, timeout_s=READ_S)
    client.read_on(CALLS)


def times_s(found: dict[str, Any]) -> list[float]:
    assert_right(found)
    return sorted(found["times_s"])


def p99_ms(times: Sequence[float]) -> float:
    """Of seconds in their order."""
    return round(1e3 * times[len(times) * 99 // 100], 1)


def longest_read(
    cluster: Cluster, client: ClientHost, harms: Sequence[Callable[[], AbstractContextManager[None]]]
) -> dict[str, int | float | str]:
    """What to publish of reads while each harm is done, one after the other, beginning in their midst."""
    times: list[float] = []
    for harm in harms:
        reads(client)
        assert_right(client.tell("mark"))
        with harm():
            client.read_on(CALLS)
            times += times_s(client.tell("stop"))
        cluster.wait_for_all(client)
    return {"times": len(harms), "reads": len(times), "ms the longest": round(1e3 * max(times), 1)}


@pytest.mark.long
@hosts_only
@etcd_too
class TestHosts:
    def test_a_server_is_killed(self, cluster: Cluster, client: ClientHost) -> None:
        """F1, I1, I4: kill -9 while it is read from. Nobody gets an error, and it is back when it is started again."""
        with proof("host-killed") as figures:
            harms = [server.killed for server in cluster.servers[1:]]
            figures.update(longest_read(cluster, client, harms))
            assert_right(client.tell("read", folder="small", timeout_s=READ_S))

    def test_a_server_hangs(self, cluster: Cluster, client: ClientHost) -> None:
        """F17, I1, I4: SIGSTOP."""
        with proof("host-stopped") as figures:
            harms = [server.stopped for server in cluster.servers[1:]]
            figures.update(longest_read(cluster, client, harms))

    def test_a_cable_is_pulled(self, cluster: Cluster, client: ClientHost) -> None:
        """F17, I1, I4: the link goes down, in the midst of reads, and up again."""
        with proof("host-unplugged") as figures:
            harms = [server.unplugged for server in cluster.servers[1:]]
            figures.update(longest_read(cluster, client, harms))

    def test_connections_are_reset_amid_a_stream(self, cluster: Cluster, client: ClientHost) -> None:
        """F18, I1, I4: by a RST, after more and more bytes of an answer."""
        with proof("host-resets") as figures:
            resets = 0
            for after in (0, 1_000, 50_000, 100_000, 150_000):
                cluster.gray.harm(DATA_PORT, Fault(kind="reset", after=after))

                def met() -> bool:
                    assert_right(client.tell("read", folder="small", timeout_s=READ_S))
                    return bool(cluster.gray.hits(DATA_PORT))

                until(met)
                resets += cluster.gray.hits(DATA_PORT)
                cluster.gray.heal(DATA_PORT)
                cluster.wait_for_all(client)
            figures["resets"] = resets

    def test_one_of_four_is_slow(self, cluster: Cluster, client: ClientHost) -> None:
        """F16, I1, I4: a hundred times slower than it was, by the bytes of its data port."""
        with proof("host-slow") as figures:
            reads(client)
            client.tell("mark")
            client.read_on(SLOW_CALLS)
            well = times_s(client.tell("mark"))
            delay_s = TIMES * statistics.median(well)
            try:
                cluster.gray.harm(DATA_PORT, Fault(kind="delay", delay_s=delay_s))
                client.read_on(SLOW_CALLS)
                slow = times_s(client.tell("stop"))
            finally:
                cluster.gray.heal(DATA_PORT)
            figures["reads with all well"] = len(well)
            figures["ms their p99 with all well"] = p99_ms(well)
            figures["reads with one slow"] = len(slow)
            figures["ms their p99 with one slow"] = p99_ms(slow)
            cluster.wait_for_all(client)

    def test_all_disks_are_full(self, cluster: Cluster, client: ClientHost) -> None:
        """F10, F11, I1, I4: tmpfs of 64 MiB. Reads pass through; saves are refused, until there is room again."""
        with proof("host-disks-full") as figures:
            fresh = cluster.put("fresh", {str(number): MIB for number in range(12)})
            client.tell("know", folder=fresh)
            theirs = [server.disk / "theirs" for server in cluster.servers]
            try:
                for file in theirs:
                    fill_up(file)
                for folder in ("small", "fresh", "fresh"):
                    assert_right(client.tell("read", folder=folder, timeout_s=READ_S))
                refused = client.ask("save", uri=f"{fresh}-save", number=1, size=24 * MIB)
                assert refused["error"] == "OutOfSpace"
            finally:
                for file in theirs:
                    file.unlink(missing_ok=True)
            saved = {"uri": f"{fresh}-save-again", "number": 2, "size": 3 * MIB}
            client.tell("save", **saved)
            assert client.tell("load", **saved)["wrong"] == []
            assert_right(client.tell("read", folder="fresh", timeout_s=READ_S))
            figures["disks filled"] = len(theirs)

    def test_the_leader_of_etcd_is_killed(self, cluster: Cluster, client: ClientHost) -> None:
        """F21, I1, I4: of three. Reads go on, who comes finds the pool, and a server that starts joins it."""
        with proof("host-etcd-leader-killed") as figures:
            reads(client)
            assert_right(client.tell("mark"))
            leader = cluster.etcd.leader()
            cluster.etcd.kill(leader)
            try:
                client.read_on(CALLS)
                assert cluster.etcd.leader() != leader
                with cluster.client(1) as newcomer:
                    know(cluster, newcomer)
                    cluster.servers[1].end()
                    cluster.servers[1].start()
                    cluster.wait_for_all(newcomer)
                client.read_on(CALLS)
                times = times_s(client.tell("stop"))
                figures.update({"reads": len(times), "ms the longest": round(1e3 * times[-1], 1)})
            finally:
                cluster.etcd.start(leader)
            cluster.etcd.leader()
            cluster.wait_for_all(client)

    def test_storage_stalls(self, cluster: Cluster, client: ClientHost) -> None:
        """F24, I1, I4: what is held is served, what isn't is an error by its deadline, until storage is well again."""
        with proof("host-storage-stalls") as figures:
            unread = cluster.put("unread", {str(number): 100_000 for number in range(12)})
            client.tell("know", folder=unread)
            cluster.storage.harm(S3_PORT, Fault(kind="stall"))
            try:
                held = client.tell("read", folder="small", timeout_s=READ_S)
                found = client.tell("read", folder="unread", timeout_s=STALLED_S)
            finally:
                cluster.storage.heal(S3_PORT, cut=True)
            assert_right(held)
            assert not found["wrong"] and not found["late"]
            assert sum(found["errors"].values()) == 12
            assert found["errors"].keys() <= TRANSIENT
            wait_until_right(client, "unread")
            figures["s to the deadline"] = STALLED_S
            figures["s until an error"] = round(found["times_s"][0], 2)

    def test_two_ranks_train_on_two_hosts(self, cluster: Cluster) -> None:
        """I1, I2: torchrun over gloo, a rank a host; stopped and run again they end with the weights of one run."""
        data = cluster.put_digits("digits", 200)
        with proof("host-ranks") as figures:
            [whole] = [event for event in train(cluster, data, "whole", 2) if event["event"] == "done"]
            train(cluster, data, "twice", 1)
            rest = train(cluster, data, "twice", 2)
            assert rest[0]["event"] == "resume"
            assert rest[-1] == whole
            figures["steps"] = whole["step"]


def train(cluster: Cluster, data: str, run: str, epochs: int) -> list[dict[str, Any]]:
    """What rank 0 tells of the example, on both of the clients' hosts."""
    command = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={cluster.clients[0].address}"]
    example = ["-m", "examples.train_ranks", data, f"s3://{cluster.bucket}/{run}", "--events"]
    example += [f"--epochs={epochs}", "--save-every=2", "--width=32"]
    ranks = []
    try:
        for number, host in enumerate(cluster.clients):
            torchrun = [sys.executable, "-m", "torch.distributed.run", *command, f"--node-rank={number}"]
            with environment({**cluster.variables(number), "GLOO_SOCKET_IFNAME": "eth0"}):
                ranks.append(
                    subprocess.Popen(
                        [*host.with_children, *torchrun, *example], stdout=subprocess.PIPE, text=True
                    )
                )
        said = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(line) for line in said[0].splitlines()]
