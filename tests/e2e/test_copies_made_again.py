"""What only the pool holds is held by as many servers as before, and soundly, after some are lost or damaged.

Real servers, a real S3 behind a gate that holds uploads up, real SIGKILL (F5, F34, F37; I1, I2).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from examples.seaweedfs import SeaweedFS
from tests.e2e.test_checkpoint_replicas import damage
from tests.integration.described_saves import load, save
from tests.integration.replica_servers import ReplicaServers, UploadGate, wait_for_save
from tests.waiting import until
from torchcache.checkpoint.catalog import list_checkpoints
from torchcache.save_names import CLAIM_NAME

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZE = 5 * 1024 * 1024


@pytest.fixture(scope="module")
def gate(s3_server: SeaweedFS) -> Iterator[UploadGate]:
    with UploadGate(s3_server.endpoint_url) as gate:
        yield gate


@pytest.fixture(scope="module")
def all_servers(
    s3_server: SeaweedFS, gate: UploadGate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReplicaServers]:
    way = {**s3_server.environment(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}"}
    folder = tmp_path_factory.mktemp("pool")
    with ReplicaServers(folder, "s3=s3://", keeps_copies=True, more=way) as servers:
        yield servers


@pytest.fixture
def servers(all_servers: ReplicaServers, gate: UploadGate) -> Iterator[ReplicaServers]:
    """All of them up, with uploads held up and a pool that has learnt nothing."""
    for number in range(3):
        if number not in all_servers.running:
            all_servers.start(number)
    all_servers.pool = all_servers.connect()
    all_servers.ids = {status.address: status.server_id for status in all_servers.pool.status()}
    gate.closed = True
    yield all_servers
    gate.closed = False


@pytest.fixture
def uri(s3: SeaweedFS) -> str:
    return f"s3://{s3.make_bucket()}/run/step-1"


def assert_loads(servers: ReplicaServers, uri: str) -> None:
    """By a client that knows nothing of what has happened."""
    assert load(servers.connect(), uri, SIZE) == (1, [])


def is_committed(s3: SeaweedFS, uri: str) -> bool:
    bucket, _, path = uri.removeprefix("s3://").partition("/")
    claim = s3.client.get_object(Bucket=bucket, Key=f"{path}/{CLAIM_NAME}")["Body"].read()
    return bool(json.loads(claim)["state"] == "committed")


def wait_for_log(servers: ReplicaServers, number: int, text: str) -> None:
    until(lambda: text in servers.log(number).read_text())


def tells_of_a_copy_made_again(servers: ReplicaServers, number: int) -> bool:
    [said] = [one for one in servers.connect().status() if one.address == servers.addresses[number]]
    assert said.oldest_pending_s > 0
    copies = said.copies
    return copies is not None and copies.held == copies.wanted == 2 and copies.made > 0


def test_a_lost_copy_is_made_again_and_outlives_the_owner(
    servers: ReplicaServers, gate: UploadGate, s3: SeaweedFS, uri: str
) -> None:
    save(servers.pool, uri, 1, SIZE)
    owner, replica, third = servers.order(uri)
    assert [c.waiting_s > 0 for c in list_checkpoints(servers.pool, uri)] == [True]
    servers.end(replica)
    shutil.rmtree(servers.store(replica))
    wait_for_log(servers, owner, f"was copied to server {servers.addresses[third]}")
    until(lambda: tells_of_a_copy_made_again(servers, owner))
    until(lambda: is_committed(s3, uri))  # says the claim: told late where storage is slow
    servers.end(owner)
    shutil.rmtree(servers.store(owner))
    assert_loads(servers, uri)
    gate.closed = False
    wait_for_save(servers.connect(), uri, lambda info: info.state == "durable")
    assert_loads(servers, uri)


def test_what_is_damaged_at_one_server_is_fetched_from_the_other(
    servers: ReplicaServers, gate: UploadGate, uri: str
) -> None:
    save(servers.pool, uri, 1, SIZE)
    owner, replica, _ = servers.order(uri)
    damage(servers.store(owner))

    def is_mended() -> bool:
        assert_loads(
            servers, uri
        )  # by the copy; the owner is told, unless it was so late that the other was asked too
        return "was damaged here: it was fetched from another server" in servers.log(owner).read_text()

    until(is_mended)
    servers.end(replica)
    assert_loads(servers, uri)
    gate.closed = False
    wait_for_save(servers.connect(), uri, lambda info: info.state == "durable")
