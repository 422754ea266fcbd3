"""A checkpoint that is cached, then replicated, then durable: the API, the command and the metrics say the same."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest

import torchcache as tc
from examples.seaweedfs import SeaweedFS
from tests.integration.described_saves import load, save
from tests.integration.replica_servers import ReplicaServers, UploadGate
from tests.waiting import until
from torchcache.checkpoint.catalog import state_of
from torchcache.cli.app import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZE = 1024 * 1024


def by_metrics(servers: ReplicaServers, number: int) -> set[str]:
    """The states in which the server has a save of its own."""
    url = f"http://127.0.0.1:{servers.metrics_ports[number]}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        found = re.findall(r'^torchcache_saves\{state="(\w+)"\} (\S+)$', answer.read().decode(), re.MULTILINE)
    assert found
    return {state for state, count in found if float(count) and state != "copy"}


def test_all_tell_the_same_state_of_a_save(
    s3_server: SeaweedFS,
    s3: SeaweedFS,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Saved while the second server is away, saved over when it is back, uploaded when storage lets it."""
    folder, root = tmp_path_factory.mktemp("pool"), f"s3://{s3.make_bucket()}/run"
    uri = f"{root}/step-1"
    with UploadGate(s3_server.endpoint_url) as gate:
        gate.closed = True
        way = {**s3_server.environment(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}"}
        with ReplicaServers(
            folder, "s3=s3://", count=2, keeps_copies=True, with_metrics=True, more=way
        ) as servers:
            monkeypatch.setenv("TORCHCACHE_POOL", ",".join(servers.addresses))
            monkeypatch.setenv("TORCHCACHE_TOKEN_FILE", str(folder / "token"))
            owner, other = servers.order(uri)

            def by_command() -> set[tuple[str, int]]:
                capsys.readouterr()
                assert run(["checkpoint", "ls", root, "--json"]) == 0
                found = json.loads(capsys.readouterr().out)["checkpoints"]
                return {(one["state"], one["replicas"]) for one in found}

            def all_say(state: str, replicas: int, *, number: int) -> None:
                pool = servers.connect()
                until(lambda: state_of(pool.get_save(*pool.resolve(uri))) == state, state)
                with tc.CheckpointManager(root, pool=pool) as manager:
                    assert [(step.step, step.state) for step in manager.list()] == [(1, state)]
                assert by_command() == {(state, replicas)}
                assert by_metrics(servers, owner) == {state}
                assert load(pool, uri, SIZE) == (number, [])

            servers.end(other)
            save(servers.pool, uri, 1, SIZE)
            all_say("cached", 1, number=1)
            servers.start(other)
            save(servers.connect(), uri, 2, SIZE, overwrite=True)
            all_say("replicated", 2, number=2)
            gate.closed = False
            all_say("durable", 0, number=2)
