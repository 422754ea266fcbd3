"""The command over the embedded pool and a real S3 server: as a process of its own, or here where that says no more."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from examples.seaweedfs import SeaweedFS
from torchcache.cli.app import run


class Done(NamedTuple):
    stdout: str
    stderr: str


def torchcache(*arguments: str, code: int = 0) -> Done:
    """A process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "torchcache.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return Done(done.stdout, done.stderr)


def torchcache_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(torchcache(*arguments, "--json", code=code).stdout)


class Here(NamedTuple):
    """The command in this process."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, code: int = 0) -> Done:
        self.capture.readouterr()
        ended = run(list(arguments))
        done = Done(*self.capture.readouterr())
        assert ended == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    return Here(capfd)


def one_line(text: str) -> str:
    """The one line that `text` is."""
    assert text.count("\n") == 1, text
    return text.strip()


def test_status_starts_no_pool(home: Path) -> None:
    done = torchcache("status", code=3)
    assert one_line(done.stderr).startswith("torchcache: no embedded pool runs here")
    assert not list(home.rglob("server.lock"))
    assert torchcache_json("status", code=3)["error"] == "ServerUnavailable"


def test_a_pool_that_is_not_there_is_code_3() -> None:
    done = torchcache("status", "--pool", "127.0.0.1:1", code=3)
    assert "127.0.0.1:1" in one_line(done.stderr)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--store", str(tmp_path / "store"), "--capacity", "1GB", "--under-store", "s3=s3://"]
        done = torchcache("serve", "--listen", address, *options, code=2)
    assert f"can't listen on {address}" in one_line(done.stderr)


def test_a_wrong_address_is_code_2() -> None:
    assert "etcd" in one_line(torchcache("ls", "--pool", "etcd://x", code=2).stderr)


def test_serve_is_the_server() -> None:
    done = torchcache("serve", "--help")
    assert done.stdout.startswith("Usage: torchcache serve ")
    for option in ("--listen", "--store", "--capacity", "--under-store"):
        assert option in done.stdout
    done = torchcache(
        "serve", "--listen", "0.0.0.0:7440", "--store", "/nowhere", "--under-store", "s3=s3://", code=2
    )
    assert done.stderr


@pytest.fixture
def running() -> Iterator[None]:
    """The embedded pool: without us its server would end between two commands that are far enough apart."""
    with tc.LocalPool():
        yield


@pytest.mark.usefixtures("s3", "running")
def test_stage_ls_and_status(s3: SeaweedFS) -> None:
    bucket = s3.make_bucket()
    for key in ("data/1/a", "data/1/b", "data/2/c"):
        s3.client.put_object(Bucket=bucket, Key=key, Body=key.encode() * 1000)
    uri = f"s3://{bucket}/data"
    report = torchcache_json("stage", uri, "--pattern", "1/*")
    assert (report["objects"], report["bytes"], report["resident_bytes"]) == (2, 16_000, 16_000)
    listing = torchcache_json("ls", uri)
    assert listing["entries"] == [
        {"name": "1/", "objects": 2, "bytes": 16_000, "resident_bytes": 16_000},
        {"name": "2/", "objects": 1, "bytes": 8_000, "resident_bytes": 0},
    ]
    assert "24.0 kB fetched" not in torchcache("stage", uri).stdout
    [server] = torchcache_json("status")["servers"]
    [s3_counts] = [u for u in server["under_stores"] if u["name"] == "s3"]
    assert (s3_counts["read_requests"], s3_counts["read_bytes"]) == (3, 24_000)
    assert uri in [n["name"] for n in server["namespaces"]]
    human = torchcache("status").stdout
    assert uri in human
    assert "s3://" in human


@pytest.mark.usefixtures("running")
def test_a_policy_waits_for_its_dataset(here: Here, tmp_path: Path) -> None:
    """Over the embedded pool: pinned and limited first, fetched then; evicted at last."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(100_000))
    assert "nothing of it is in the pool now" in here("pin", str(folder)).stdout
    here("limit", str(folder), "--quota", "1GB", "--ttl", "2d")
    here("stage", str(folder))
    [server] = here.json("status")["servers"]
    [found] = [n for n in server["namespaces"] if n["name"] == f"file://{folder}"]
    assert (found["pinned"], found["quota_bytes"], found["ttl_s"]) == (True, 10**9, 172_800)
    assert found["chunks"] == 1
    assert f"file://{folder}" in one_line(here("evict", str(folder), code=2).stderr)
    here("unpin", str(folder))
    assert here.json("evict", str(folder))["freed_bytes"] >= 100_000
    assert here.json("ls", str(folder))["total"]["resident_bytes"] == 0


@pytest.mark.usefixtures("s3", "running")
def test_bad_input_is_one_line(here: Here, s3: SeaweedFS) -> None:
    bucket = s3.make_bucket()
    for words in (["ls"], ["stage"], ["checkpoint", "ls"]):
        done = here(*words, "s3://no-such-bucket-here/x", code=1)
        assert "no-such-bucket-here" in one_line(done.stderr)
    done = here("stage", f"s3://{bucket}/empty", code=1)
    assert f"s3://{bucket}/empty" in one_line(done.stderr)
    assert "gs://x" in one_line(here("ls", "gs://x/y", code=2).stderr)
    assert f"s3://{bucket}/none" in one_line(
        here("checkpoint", "verify", f"s3://{bucket}/none", code=1).stderr
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_are_listed_and_verified(here: Here, s3: SeaweedFS, tmp_path: Path) -> None:
    bucket = s3.make_bucket()
    uri = f"s3://{bucket}/run/step-1"
    state = {"w": torch.randn(300, 400), "big": torch.randn(5_000_000), "step": 1}
    dcp.save(state, storage_writer=tc.CacheStorageWriter(uri, durability="store"), no_dist=True)
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    [found] = here.json("checkpoint", "ls", f"s3://{bucket}/run")["checkpoints"]
    assert (found["uri"], found["state"], found["pending_bytes"]) == (uri, "durable", 0)
    assert here.json("checkpoint", "ls", f"s3://{bucket}")["checkpoints"] == [found]
    absent = here("checkpoint", "ls", uri.removesuffix("-1"), code=1)
    assert "neither the pool nor storage has anything at" in one_line(absent.stderr)
    assert found["bytes"] > 20_000_000
    report = here.json("checkpoint", "verify", uri)
    assert report["ok"]
    assert report["bytes"] > 20_000_000
    assert "is good" in torchcache("checkpoint", "verify", uri).stdout

    [shard] = [
        o["Key"] for o in s3.client.list_objects_v2(Bucket=bucket)["Contents"] if o["Key"].endswith(".distcp")
    ]
    body = bytearray(s3.client.get_object(Bucket=bucket, Key=shard)["Body"].read())
    body[len(body) // 2] ^= 1
    s3.client.put_object(Bucket=bucket, Key=shard, Body=bytes(body))
    damaged = here.json("checkpoint", "verify", uri, code=1)
    assert not damaged["ok"]
    [fault] = damaged["faults"]
    assert fault["item"] == "big"

    stock = f"file://{tmp_path}/stock"
    assert here.json("checkpoint", "ls", stock)["checkpoints"][0]["state"] == "stock"
    assert "without torchcache" in one_line(here("checkpoint", "verify", stock, code=1).stderr)
