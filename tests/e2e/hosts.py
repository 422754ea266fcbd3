"""A pool on hosts of its own: servers that announce themselves in a real etcd, over TLS, beside storage and clients.

Server 0 is reached by way of a proxy on its host, which harms what passes when it is told to; so is storage.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from examples.seaweedfs import environment
from tests.e2e.etcd_hosts import EtcdHosts
from tests.integration.own_network import Host, OwnNetwork
from tests.integration.store_process_parts import Child, Life, PlainStarter
from tests.proxy import Fault
from tests.waiting import until
from torchcache.cli.app import run as torchcache

ANSWER_S: Final = 400.0
PORT, DATA_PORT, S3_PORT = 7440, 7441, 8333
SERVERS: Final = 4
SERVER, PROXY, ETCD, STORAGE, CLIENT = 10, 20, 30, 40, 50
"""The numbers of the hosts of each kind begin with these; `PROXY` is another address of server 0."""


class ServerHost:
    """A server from `start` on, with its store on the host's own disk."""

    def __init__(self, host: Host, log: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
        self.host = host
        self.disk = host.seen(host.disk)
        self._log = log
        self._variables = variables
        self._arguments = [
            *("--listen", f"{host.address}:{PORT}", "--store", str(host.disk / "store")),
            *("--scrub-rate", "0", "--lease-s", "2", *arguments),
        ]

    def launch(self) -> None:
        """Starts it and doesn't wait; `life.wait_ready` does."""
        with environment(self._variables):
            self.life: Life = PlainStarter(through=self.host.through).start(self._arguments, self._log)

    def start(self) -> None:
        self.launch()
        self.life.wait_ready()

    def end(self, how: signal.Signals = signal.SIGKILL) -> int | None:
        return self.life.end(how)

    @contextmanager
    def killed(self) -> Iterator[None]:
        """kill -9, and started again afterwards."""
        self.end()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT afterwards."""
        self.life.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.life.send(signal.SIGCONT)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self.host.link("down")
        try:
            yield
        finally:
            self.host.link("up")

    def descriptors(self) -> Counter[str]:
        """What it has open: files by their names, connections by the port at their other end."""
        process = Path(f"/proc/{self.life.pid}")
        ports = {}
        for table in ("tcp", "tcp6"):
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                ports[f"socket:[{fields[9]}]"] = int(fields[2].rpartition(":")[2], 16)
        found: Counter[str] = Counter()
        for entry in (process / "fd").iterdir():
            try:
                what = str(entry.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            port = ports.get(what)
            found[f"connection to {port}" if port else what.partition(":[")[0].rpartition("/")[2]] += 1
        return found

    @property
    def memory_bytes(self) -> int:
        """Its own, without what it maps of its segments: that is the page cache's."""
        lines = Path(f"/proc/{self.life.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["RssAnon"].split()[0]) * 1024


class ClientHost:
    """A program on a client's host that does what it is told; see client_child.py."""

    def __init__(self, host: Host, variables: Mapping[str, str], *, seed: int = 0) -> None:
        with environment(variables):
            self._child = Child("tests.e2e.client_child", {"seed": seed}, through=host.through)
        self._child.answer(ANSWER_S, "start")

    def ask(self, do: str, **more: object) -> dict[str, Any]:
        """Its answer, which may be an error."""
        return self._child.ask({"do": do, **more}, ANSWER_S)

    def tell(self, do: str, **more: object) -> dict[str, Any]:
        """Its answer, which must be none."""
        answer = self.ask(do, **more)
        assert "error" not in answer, answer["error"]
        return answer

    def read_on(self, calls: int) -> None:
        """Waits until it has made so many more."""
        enough = self.tell("count")["calls"] + calls
        until(lambda: self.tell("count")["calls"] >= enough, seconds=ANSWER_S)

    def close(self) -> None:
        self._child.close()


class Proxies:
    """Those of a host, told what harm to do; see proxy_child.py."""

    def __init__(self, host: Host, listen: str, ports: Mapping[int, tuple[str, int]]) -> None:
        job = {"listen": listen, "ports": ports}
        self._child = Child("tests.integration.proxy_child", job, through=host.through)
        self._child.answer(ANSWER_S, "start")
        self.close = self._child.close

    def harm(self, port: int, fault: Fault) -> None:
        self._child.ask({"port": port, "fault": asdict(fault)}, ANSWER_S)

    def hits(self, port: int) -> int:
        """How often harm was done since the last order to do some."""
        hits: Any = self._child.ask({"port": port}, ANSWER_S)["hits"]
        return int(hits)

    def heal(self, port: int, *, cut: bool = False) -> None:
        self._child.ask({"port": port, "fault": None, "cut": cut}, ANSWER_S)


class Cluster:
    """All of it, from entering to leaving. `arguments` are for all servers."""

    known = "small"
    """The folder that clients read from while they wait."""

    def __init__(self, folder: Path, *, arguments: Sequence[str] = ()) -> None:
        self.folder = folder
        self._arguments = arguments

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            self._start(stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def client(self, number: int, *, seed: int = 0) -> closing[ClientHost]:
        """A program with a pool of its own, on a client's host; for a `with` statement."""
        return closing(ClientHost(self.clients[number], self.variables(number), seed=seed))

    def variables(self, number: int) -> dict[str, str]:
        """The environment of programs on a client's host: all that a user sets there."""
        return client_variables(self.pool, self.folder / "keys", self.folder / f"home-{number}")

    def put(self, folder: str, sizes: Mapping[str, int], *, called: str | None = None) -> str:
        """Puts objects into storage that say of themselves who they are; the URI of their folder.

        By default that they are "FOLDER/NAME"; `called` stands before their names instead.
        """
        order = {"put": folder, "sizes": sizes, "called": f"{folder}/" if called is None else called}
        self._storage.ask(order, ANSWER_S)
        return f"s3://{self.bucket}/{folder}"

    def put_digits(self, folder: str, count: int) -> str:
        self._storage.ask({"digits": folder, "count": count}, ANSWER_S)
        return f"s3://{self.bucket}/{folder}"

    def wait_for_all(self, client: ClientHost) -> None:
        """Until all servers have joined, and this client reads from each of them."""

        def all_there() -> bool:
            client.ask("read", folder=self.known, timeout_s=60.0)
            seen = client.ask("pool")
            found = [len(seen.get(kind, ())) for kind in ("announced", "members", "out")]
            return found == [len(self.servers), len(self.servers), 0]

        until(all_there)

    # ---- starting ----

    def _start(self, stack: ExitStack) -> None:
        network = stack.enter_context(OwnNetwork())

        def hosts(first: int, count: int, size: str = "64m") -> list[Host]:
            numbers = range(first, first + count)
            return [network.add(number, self.folder / f"disk-{number}", size) for number in numbers]

        self.clients = hosts(CLIENT, 2)
        self._start_storage(stack, *hosts(STORAGE, 1))
        self.etcd = stack.enter_context(EtcdHosts(hosts(ETCD, 3, "512m"), self.folder))
        self.pool = self.etcd.address("hosts")
        self._start_servers(stack, hosts(SERVER, SERVERS))

    def _start_servers(self, stack: ExitStack, hosts: Sequence[Host]) -> None:
        first, proxy = hosts[0], hosts[0].add_address(PROXY)
        keys = self.folder / "keys"
        make_keys(keys, [*(host.address for host in hosts), proxy])
        ports = {port: (first.address, port) for port in (PORT, DATA_PORT)}
        self.gray = stack.enter_context(closing(Proxies(first, proxy, ports)))
        self.servers = []
        for number, host in enumerate(hosts):
            more = [*server_arguments(keys), *self._arguments, "--under-store", "s3=s3://"]
            more += ["--join", self.pool, *(("--advertise", proxy) if host is first else ())]
            log = self.folder / f"server-{number}.log"
            self.servers.append(ServerHost(host, log, more, self._server_variables))
        for server in self.servers:
            server.launch()
            stack.callback(server.end)
        for server in self.servers:
            server.life.wait_ready()

    def _start_storage(self, stack: ExitStack, host: Host) -> None:
        self._storage = Child(
            "tests.e2e.storage_child", {"folder": str(self.folder / "weed")}, through=host.with_children
        )
        stack.callback(self._storage.end)  # what it leaves behind when it is killed lies in /tmp
        said: Any = self._storage.answer(ANSWER_S, "start")
        self.bucket: str = said["bucket"]
        self.storage = stack.enter_context(
            closing(Proxies(host, host.address, {S3_PORT: ("127.0.0.1", said["port"])}))
        )
        self._server_variables = said["keys"] | {"AWS_ENDPOINT_URL": f"http://{host.address}:{S3_PORT}"}


def make_keys(folder: Path, hosts: Sequence[str]) -> None:
    """An authority, and certificates and a token for these hosts."""
    assert torchcache(["keygen", str(folder), *(word for host in hosts for word in ("--host", host))]) == 0


def server_arguments(keys: Path) -> list[str]:
    """How a server is told of its keys."""
    return [
        *("--tls-cert", str(keys / "server.pem"), "--tls-key", str(keys / "server-key.pem")),
        *("--tls-client-ca", str(keys / "ca.pem"), "--token-file", str(keys / "token"), "--capacity", "1GB"),
    ]


def client_variables(pool: str, keys: Path, home: Path) -> dict[str, str]:
    """How a client is told of its pool. By the network, though it is one machine."""
    return {
        "TORCHCACHE_POOL": pool,
        "TORCHCACHE_LANE": "flight",
        "TORCHCACHE_HOME": str(home),
        "TORCHCACHE_TOKEN_FILE": str(keys / "token"),
        "TORCHCACHE_TLS_CA": str(keys / "ca.pem"),
        "TORCHCACHE_TLS_CERT": str(keys / "client.pem"),
        "TORCHCACHE_TLS_KEY": str(keys / "client-key.pem"),
    }
