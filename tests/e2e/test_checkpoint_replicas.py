"""Servers of a pool are lost while only they hold a checkpoint: what was acknowledged loads, and becomes durable.

Real servers, a real S3 behind a gate that holds uploads up, real SIGKILL (F1, F2, F19, F21, F34, F37; I1, I2, I3).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.seaweedfs import SeaweedFS
from tests.integration.described_saves import load, save
from tests.integration.replica_servers import ReplicaServers, UploadGate, wait_for_save
from tests.waiting import until
from torchcache.checkpoint.catalog import list_checkpoints
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.verification import verify_save
from torchcache.errors import ConfigurationError, NotCommitted, ServerUnavailable
from torchcache.pool import Pool, lane_choice
from torchcache.pool.hedging import Calls

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZE = 5 * 1024 * 1024
TAKEN_OVER = "it is uploaded from the copy here"


@pytest.fixture(scope="module")
def gate(s3_server: SeaweedFS) -> Iterator[UploadGate]:
    with UploadGate(s3_server.endpoint_url) as gate:
        yield gate


@pytest.fixture(scope="module")
def all_servers(
    s3_server: SeaweedFS, gate: UploadGate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReplicaServers]:
    way = {**s3_server.environment(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}"}
    with ReplicaServers(tmp_path_factory.mktemp("pool"), "s3=s3://", more=way) as servers:
        yield servers


@pytest.fixture
def servers(all_servers: ReplicaServers, gate: UploadGate) -> Iterator[ReplicaServers]:
    """All of them up before each test, with a pool that has learnt nothing; nothing left to upload after it."""
    all_servers.pool = all_servers.connect()
    yield all_servers
    gate.closed = False
    for number in range(3):
        if number not in all_servers.running:
            all_servers.start(number)
    until(lambda: all_servers.kept() == [])


@pytest.fixture
def uri(s3: SeaweedFS) -> str:
    return f"s3://{s3.make_bucket()}/run/step-1"


def acknowledged(servers: ReplicaServers, gate: UploadGate, uri: str, number: int = 1) -> tuple[int, int]:
    """Saves while uploads are held up; the owner and the server with the copy."""
    gate.closed = True
    save(servers.pool, uri, number, SIZE, overwrite=number > 1)
    info = servers.pool.get_save(*servers.pool.resolve(uri))
    assert (info.state, info.replicas) == ("committed", 2)
    owner, replica, _ = servers.order(uri)
    assert info.server == servers.ids[servers.addresses[owner]]
    return owner, replica


def assert_loads(servers: ReplicaServers, uri: str, number: int = 1) -> None:
    """By a client that knows nothing of what has happened."""
    assert load(servers.connect(), uri, SIZE) == (number, [])


def assert_durable(servers: ReplicaServers, gate: UploadGate, uri: str, number: int = 1) -> None:
    gate.closed = False
    wait_for_save(servers.pool, uri, lambda info: info.state == "durable")
    assert_loads(servers, uri, number)


def assert_gone(servers: ReplicaServers, uri: str) -> None:
    with pytest.raises(NotCommitted):
        servers.connect().get_save(*servers.pool.resolve(uri))


def test_the_owner_is_lost_before_the_upload(servers: ReplicaServers, gate: UploadGate, uri: str) -> None:
    owner, replica = acknowledged(servers, gate, uri)
    servers.end(owner)
    assert_loads(servers, uri)
    assert [c.state for c in list_checkpoints(servers.connect(), uri)] == ["replicated"]
    assert_durable(servers, gate, uri)
    # Started again it has a save that another server has uploaded: no second upload, nothing stale.
    servers.start(owner)
    assert_durable(servers, gate, uri)
    servers.pool.delete_save(*servers.pool.resolve(uri))
    assert_gone(servers, uri)
    assert TAKEN_OVER in servers.log(replica).read_text()


def test_the_copy_is_lost(servers: ReplicaServers, gate: UploadGate, uri: str) -> None:
    _, replica = acknowledged(servers, gate, uri)
    servers.end(replica)
    assert_loads(servers, uri)
    assert_durable(servers, gate, uri)
    servers.start(replica)
    until(lambda: servers.kept() == [])
    assert_loads(servers, uri)


@pytest.mark.parametrize("place", ["the copy", "neither"])
def test_the_server_on_this_machine_is_asked_first(
    servers: ReplicaServers, gate: UploadGate, uri: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The others are as if on other machines."""
    _, replica = acknowledged(servers, gate, uri)
    beside = replica if place == "the copy" else servers.order(uri)[2]
    near = servers.ids[servers.addresses[beside]]
    local_store, run = lane_choice.local_store, Calls.run

    def only_near(info: Any, server_id: str) -> Any:
        if server_id != near:
            raise ConfigurationError("it is on another machine")
        return local_store(info, server_id)

    asked: list[str] = []

    def noted(self: Calls, groups: Any) -> Any:
        asked.extend(part.server for group in groups for part in group if part.extent.object.id.is_save)
        return run(self, groups)

    monkeypatch.setattr(lane_choice, "local_store", only_near)
    monkeypatch.setattr(Calls, "run", noted)
    assert_loads(servers, uri)
    assert asked
    assert asked[0] == near
    if place == "the copy":
        assert set(asked) == {near}


def test_both_are_lost_and_one_comes_back(servers: ReplicaServers, gate: UploadGate, uri: str) -> None:
    owner, replica = acknowledged(servers, gate, uri)
    servers.end(owner)
    servers.end(replica)
    with pytest.raises(ServerUnavailable):  # not "there is none": nobody who could know was asked
        servers.pool.get_save(*servers.pool.resolve(uri))
    servers.start(replica)
    assert_loads(servers, uri)
    assert_durable(servers, gate, uri)


def test_a_server_is_down_while_it_is_saved(
    servers: ReplicaServers, gate: UploadGate, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    owner, replica, third = servers.order(uri)
    servers.end(owner)
    gate.closed = True
    save(servers.pool, uri, 1, SIZE)  # its next in order owns it then, and the third has the copy
    info = servers.pool.get_save(*servers.pool.resolve(uri))
    assert (info.replicas, info.server) == (2, servers.ids[servers.addresses[replica]])
    servers.end(third)
    save(servers.pool, uri + "0", 1, SIZE)
    assert servers.pool.get_save(*servers.pool.resolve(uri + "0")).replicas == 1
    assert "is safe on 1 server of the pool, not on 2" in caplog.text
    servers.end(replica)
    servers.start(owner)  # knows nothing of it, and may not say that there is none
    with pytest.raises(ServerUnavailable):
        servers.pool.get_save(*servers.pool.resolve(uri))
    servers.start(third)
    assert_loads(servers, uri)
    assert_durable(servers, gate, uri)
    with pytest.raises(ConfigurationError, match="replicas=4, but the pool has 3 servers"):
        servers.pool.reserve_save("s3", "b/c", "", "id", overwrite=False, writer="me", replicas=4)


def test_an_owner_that_was_asleep_finds_its_save_uploaded(
    servers: ReplicaServers, gate: UploadGate, uri: str
) -> None:
    owner, replica = acknowledged(servers, gate, uri)
    servers.send(owner, signal.SIGSTOP)
    before = servers.log(replica).read_text().count(TAKEN_OVER)
    until(lambda: servers.log(replica).read_text().count(TAKEN_OVER) > before)
    servers.send(owner, signal.SIGCONT)
    assert_durable(servers, gate, uri)
    until(lambda: servers.kept() == [])
    assert servers.pool.get_save(*servers.pool.resolve(uri)).error is None


def test_a_later_save_at_another_server_is_not_passed_over(
    servers: ReplicaServers, gate: UploadGate, uri: str
) -> None:
    owner, _ = acknowledged(servers, gate, uri)
    servers.end(owner)
    save(servers.pool, uri, 2, SIZE, overwrite=True)
    servers.start(owner)  # with the first save, not uploaded
    assert_loads(servers, uri, 2)
    assert_durable(servers, gate, uri, 2)
    until(lambda: servers.kept() == [])
    assert_loads(servers, uri, 2)


def test_a_copy_goes_with_its_checkpoint(servers: ReplicaServers, gate: UploadGate, uri: str) -> None:
    acknowledged(servers, gate, uri)
    servers.pool.delete_save(*servers.pool.resolve(uri))
    assert_gone(servers, uri)
    until(lambda: servers.kept() == [])
    save(servers.pool, uri, 2, SIZE)
    assert_durable(servers, gate, uri, 2)


def test_a_description_too_large_for_a_message_is_copied_too(
    servers: ReplicaServers, gate: UploadGate, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchcache.pool.saves.MAX_INLINE_BYTES", 100)
    owner, _ = acknowledged(servers, gate, uri)
    servers.end(owner)
    assert_loads(servers, uri)
    assert_durable(servers, gate, uri)


def test_a_server_that_stops_says_which_copies_it_leaves(
    servers: ReplicaServers, gate: UploadGate, uri: str
) -> None:
    """F36"""
    _, replica = acknowledged(servers, gate, uri)
    assert servers.end(replica, signal.SIGTERM) == 1
    assert f"not yet in the under-store: {uri}" in servers.log(replica).read_text()
    assert_durable(servers, gate, uri)


def damage(store: Path) -> None:
    """Flips a bit in the middle of the segment that was written last."""
    largest = max(store.glob("segments/*/*"), key=lambda file: file.stat().st_mtime)
    with largest.open("r+b") as file:
        file.seek(2 * 1024 * 1024)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def verified(servers: ReplicaServers, uri: str) -> dict[str, list[str]]:
    """By the address of each place that has some of the save, or "storage": what is wrong there."""
    pool = servers.connect()
    info = pool.get_save(*pool.resolve(uri))
    manifest = Manifest.decode(info.manifest, where=uri)
    places = verify_save(pool, info, manifest, on_progress=lambda *_: None, servers=pool.servers())
    return {place.name: [fault.error.message for fault in place.faults] for place in places}


@pytest.mark.parametrize("lane", ["auto", "flight"])
def test_each_place_is_verified_by_itself(
    servers: ReplicaServers, gate: UploadGate, uri: str, lane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = servers.connect
    monkeypatch.setattr(servers, "connect", lambda: Pool(connect().source, lane))
    owner, replica = acknowledged(servers, gate, uri)
    first, second = servers.addresses[owner], servers.addresses[replica]
    assert verified(servers, uri) == {first: [], second: []}
    servers.end(owner)
    damage(servers.store(owner))
    servers.start(owner)
    first = servers.addresses[owner]
    found = verified(servers, uri)
    assert found.keys() == {first, second, "pool"}
    assert found[first] and not found[second]
    assert found["pool"] == ["1 server holds all of it; when it was committed 2 did"]
    assert_durable(servers, gate, uri)
    assert verified(servers, uri)["storage"] == []


def test_a_bit_of_one_copy_flips(
    servers: ReplicaServers, gate: UploadGate, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read from the other, and uploaded from there."""
    owner, _ = acknowledged(servers, gate, uri)
    servers.end(owner)
    damage(servers.store(owner))
    servers.start(owner)
    assert_loads(servers, uri)
    assert f"is damaged at {servers.addresses[owner]}: another copy is read" in caplog.text
    assert_durable(servers, gate, uri)
    until(lambda: servers.kept() == [])
