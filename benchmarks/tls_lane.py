"""What travels over TLS, as it does between machines: CachedDataset beside a bare TLS connection, on loopback.

The bare one has no framing, no look-up and no verification: what it needs is the least that a transport of our own,
which would be written around Python's ssl, could come to.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torchcache as tc
from benchmarks.bare_files import buffers
from benchmarks.bare_socket import tls_client
from benchmarks.findings import Findings, Row, Scale, us_each
from benchmarks.places import WarmPool, memory_folder, write_files
from benchmarks.records import Ground, all_of, check, reader, records_shape
from benchmarks.rounds import Result, alternate
from torchcache.cli.certificates import make_authority, make_certificate

OURS = "torchcache, flight lane, TLS"
BARE = "a TLS socket"


def measure(scale: Scale) -> Findings:
    """Records in batches, into the same buffers; both ends with certificates that `torchcache keygen` made."""
    shape = records_shape(scale)
    batches, into = shape.batches(), buffers(shape.batch, shape.size)
    with memory_folder() as root, ExitStack() as stack:
        keys, source, flat = root / "keys", root / "source", root / "flat"
        _write_keys(keys)
        files = write_files(source, [shape.size] * shape.count)
        with flat.open("wb") as joined:
            for file in files:
                joined.write(file.read_bytes())
        warm = stack.enter_context(_pool(root, keys, capacity_bytes=2 * shape.bytes + (1 << 28)))
        bare = stack.enter_context(tls_client(flat, shape.size, keys))
        tc.CachedDataset.from_files(source, pool=warm.pool).stage(progress=False)
        found = Ground(shape, source, flat, warm)
        ours = reader(found, "numpy")
        check(found, ours)
        bare.read(batches[0], into)
        check(found, lambda batch: into[: len(batch)])
        results = alternate(
            {OURS: all_of(shape, ours), BARE: lambda: sum(bare.read(batch, into) for batch in batches)},
            rounds=scale.rounds,
            servers={OURS: warm.pids, BARE: [bare.pid]},
        )
    rows = [
        _row(
            f"batches of {shape.name}",
            "us a record",
            *(us_each(results[name], shape.count) for name in (OURS, BARE)),
        ),
        _row("client's CPU", "s/GB", *(results[name].client_cpu_s_per_gb for name in (OURS, BARE))),
        _row("server's CPU", "s/GB", *(results[name].server_cpu_s_per_gb for name in (OURS, BARE))),
        _row("CPU of both", "s/GB", *(_both(results[name]) for name in (OURS, BARE))),
    ]
    return Findings(
        title="Over the network, with TLS", rows=rows, contenders={shape.name: list(results.values())}
    )


def _row(what: str, unit: str, ours: float, bare: float) -> Row:
    return Row(what=what, unit=unit, ours=ours, bare=bare, against=BARE)


def _both(result: Result) -> float:
    return result.client_cpu_s_per_gb + result.server_cpu_s_per_gb


def _write_keys(folder: Path) -> None:
    """What `torchcache keygen` makes, as far as servers need it."""
    folder.mkdir()
    authority = make_authority()
    server = make_certificate(authority, "server", ["127.0.0.1"], days=1)
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "server.pem").write_bytes(server.certificate)
    (folder / "server-key.pem").write_bytes(server.key)


@contextmanager
def _pool(root: Path, keys: Path, *, capacity_bytes: int) -> Iterator[WarmPool]:
    """A server that asks for TLS, and a pool of it alone."""
    arguments = ["--listen", "127.0.0.1:0", "--store", root / "store", "--capacity", capacity_bytes]
    arguments += ["--under-store", "file=file:///", "--token-file", root / "token"]
    arguments += ["--tls-cert", keys / "server.pem", "--tls-key", keys / "server-key.pem"]
    command = [sys.executable, "-m", "torchcache_server", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            address = line.partition(" listening on ")[2].partition(" ")[0]
            if not address:
                raise RuntimeError("the server with TLS did not start")
            token = (root / "token").read_text().strip()  # the server has made it
            pool = tc.connect(address, token=token, tls=tc.TlsConfig(ca=keys / "ca.pem"), lane="flight")
            with closing(pool):
                yield WarmPool(pool, address, token, (process.pid,))
        finally:
            process.kill()
