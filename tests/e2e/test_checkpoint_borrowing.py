"""Runs of which most doesn't change, through a real pool: what is sent and stored; each checkpoint is whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from tests.integration.replica_servers import ReplicaServers, wait_for_save
from tests.unit.checkpoint_states import assert_same, blank
from tests.waiting import until
from torchcache.checkpoint import writer
from torchcache.checkpoint.catalog import list_checkpoints
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.reuse import Memory
from torchcache.errors import InUse
from torchcache.model import SAVE_PREFIX

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOM = 1.5
"""In checkpoints; with less a save that replaces another finds none, with or without loans."""
FROZEN = 12
FROZEN_NAMES = {f"layer.{number:02d}" for number in range(FROZEN)}
FROZEN_BYTES = 6 * 1024 * 1024 + 4096


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MEMORY", Memory())


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path / "pool", "600MB") as pool:
        yield pool


def adapters() -> dict[str, Any]:
    """Frozen weights, an adapter beside each, and moments of those."""
    chance = torch.Generator().manual_seed(1)
    state: dict[str, Any] = {}
    for number in range(FROZEN):
        state[f"layer.{number:02d}"] = torch.randn(FROZEN_BYTES // 4, generator=chance)
        state[f"layer.{number:02d}.lora"] = torch.randn(20_000, generator=chance)
    moments = {f"moment.{name}": torch.zeros_like(t) for name, t in state.items() if name.endswith("lora")}
    return {**state, **moments, "step": 0}


def train(state: dict[str, Any]) -> None:
    for name, tensor in state.items():
        if "lora" in name:
            tensor.add_(1)
    state["step"] += 1


def load(pool: tc.Pool, uri: str, like: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = blank(like)
    dcp.load(loaded, storage_reader=tc.CacheStorageReader(uri, pool=pool))
    return loaded


def saved(pool: tc.Pool) -> dict[str, int]:
    """Namespaces of saves in the pool, and their bytes."""
    namespaces = [n for status in pool.status() for n in status.namespaces]
    return {n.name: n.bytes for n in namespaces if n.name.startswith(SAVE_PREFIX)}


def test_a_run_over_frozen_weights_sends_and_stores_a_twentieth(pool: tc.Pool, tmp_path: Path) -> None:
    """The goal of the issue; and the checkpoint it borrowed from is deleted, in the pool and in storage."""
    root, state = f"file://{tmp_path}/run", adapters()
    with tc.CheckpointManager(root, keep_last=1, pool=pool, rng=False) as manager:
        manager.save(1, state)
        sent = pool.statistics().written_bytes
        stored = sum(saved(pool).values())
        for step in range(2, 5):
            before = pool.statistics().written_bytes
            train(state)
            manager.save(step, state)
            assert pool.statistics().written_bytes - before < 0.05 * sent
            manager.wait_durable()
            assert [one.step for one in manager.list()] == [step]
            assert not (tmp_path / "run" / f"step-{step - 1}" / ".metadata").exists()
            assert sum(saved(pool).values()) < 1.05 * stored
            assert_same(load(pool, f"{root}/step-{step}", state), state)
    stock: dict[str, Any] = blank(state)
    dcp.load(stock, storage_reader=dcp.FileSystemReader(tmp_path / "run" / "step-4"))
    assert_same(stock, state)
    pool.delete_save(*pool.resolve(f"{root}/step-4"))
    assert saved(pool) == {}


@pytest.mark.parametrize("reuse_unchanged", [True, False])
def test_a_pool_with_room_for_little_more_than_a_checkpoint_takes_save_after_save(
    tmp_path: Path, reuse_unchanged: bool
) -> None:
    """F11: each uploaded before the next, so that it may make room, with and without loans, whatever changes."""
    root, chance = f"file://{tmp_path}/run", random.Random(5)
    state = {f"layer.{number}": torch.zeros(1024 * 1024) for number in range(8)}
    size = sum(tensor.nbytes for tensor in state.values())
    with (
        tc.LocalPool(tmp_path / "pool", int(ROOM * size)) as pool,
        tc.CheckpointManager(
            root, keep_last=1, pool=pool, rng=False, reuse_unchanged=reuse_unchanged
        ) as manager,
    ):
        for step, changing in enumerate([8, 1, 8, 4, 4, 1, 3, 8, 0, 5, 2, 8]):
            for name in chance.sample(sorted(state), changing):
                state[name] += 1
            manager.save(step, state)
            assert_same(load(pool, f"{root}/step-{step}", state), state)
            manager.wait_durable(step)


def test_what_is_borrowed_outlives_the_server(tmp_path: Path) -> None:
    """Not uploaded yet, its base deleted, and the server started anew on its store."""
    (tmp_path / "run").mkdir()
    root, state = f"file://{tmp_path}/run", adapters()
    with tc.LocalPool(tmp_path / "pool", "600MB") as pool:
        dcp.save(state, storage_writer=tc.CacheStorageWriter(f"{root}/step-1", pool=pool))
        train(state)
        dcp.save(state, storage_writer=tc.CacheStorageWriter(f"{root}/step-2", pool=pool))
        info = pool.get_save(*pool.resolve(f"{root}/step-2"))
        assert info.borrowed
        pool.delete_save(*pool.resolve(f"{root}/step-1"))
    with tc.LocalPool(tmp_path / "pool", "600MB") as pool:
        assert len(saved(pool)) == 2
        assert_same(load(pool, f"{root}/step-2", state), state)
        assert [c.uri for c in list_checkpoints(pool, root)] == [f"{root}/step-2"]


def test_a_base_that_was_damaged_meanwhile_is_not_borrowed_from(pool: tc.Pool, tmp_path: Path) -> None:
    """F34: one bit of one file; that one is sent again."""
    root, state = f"file://{tmp_path}/run", adapters()
    dcp.save(state, storage_writer=tc.CacheStorageWriter(f"{root}/step-1", pool=pool))
    path, at = _a_byte_of(tmp_path / "pool", state["layer.05"])
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    train(state)
    dcp.save(state, storage_writer=tc.CacheStorageWriter(f"{root}/step-2", pool=pool))
    lent = pool.get_save(*pool.resolve(f"{root}/step-2")).borrowed
    first = Manifest.decode(pool.get_save(*pool.resolve(f"{root}/step-1")).manifest, where="step-1")
    (damaged,) = (item.file for item in first.items if item.name == "layer.05")
    assert set(lent) == {item.file for item in first.items if item.name in FROZEN_NAMES} - {damaged}
    assert_same(load(pool, f"{root}/step-2", state), state)


def _a_byte_of(folder: Path, tensor: torch.Tensor) -> tuple[Path, int]:
    """Where in a store some byte of the tensor lies."""
    wanted = tensor.numpy().tobytes()[4096:8192]
    for path in folder.rglob("*.segment"):
        at = path.read_bytes().find(wanted)
        if at >= 0:
            return path, at + 100
    raise AssertionError("the tensor is in no segment")


def test_it_is_loaded_from_storage_when_the_pool_is_gone(tmp_path: Path) -> None:
    root, state = f"file://{tmp_path}/run", adapters()
    with tc.LocalPool(tmp_path / "pool", "600MB") as pool:
        for step in (1, 2):
            train(state)
            with tc.CheckpointManager(root, keep_last=2, pool=pool) as manager:
                manager.save(step, {"all": state})
                manager.wait_durable()
    shutil.rmtree(tmp_path / "pool")
    shutil.rmtree(tmp_path / "run" / "step-1")
    with tc.LocalPool(tmp_path / "other", "600MB") as pool:
        loaded: dict[str, Any] = {"all": blank(state)}
        assert tc.CheckpointManager(root, pool=pool).load(loaded) == 2
        assert_same(loaded["all"], state)


def test_in_a_pool_of_several_both_servers_lend(tmp_path: Path) -> None:
    """From the third save on, which goes where the second lies; the server with a copy of that has it still."""
    (tmp_path / "source").mkdir()
    root, state = f"file://{tmp_path}/source/run", adapters()
    with ReplicaServers(tmp_path, f"file=file://{tmp_path}/source", count=3) as servers:
        pool = servers.pool
        store, run = pool.resolve(root)
        sent = [0]
        holders: list[frozenset[str]] = []
        for step in range(1, 5):
            train(state)
            uri = f"{root}/step-{step}"
            dcp.save(state, storage_writer=tc.CacheStorageWriter(uri, pool=pool))
            sent.append(pool.statistics().written_bytes)
            base = writer.MEMORY.base(store, f"{run}/next", "")
            assert base is not None
            holders.append(frozenset(base.servers))
            if step > 2 and holders[-1] == holders[-2]:  # else one of them was silent for too long
                assert sent[step] - sent[step - 1] < 0.05 * sent[1]
            info = pool.get_save(*pool.resolve(uri))
            if info.state != "durable":
                assert info.replicas == 2
            assert_same(load(servers.connect(), uri, state), state)
            wait_for_save(pool, uri, lambda info: info.state == "durable")
            until(lambda: not any(n.dirty for s in pool.status() for n in s.namespaces))
        for step in range(1, 5):
            save = pool.get_save(*pool.resolve(f"{root}/step-{step}"))
            for server in pool.servers():
                seen = replace(
                    save, server=server
                )  # to some reader: it isn't its path's owner that has every one
                pool.hold_save(seen, "reader", "a test")
                with pytest.raises(InUse, match="is being read by a test"):
                    pool.delete_save(*pool.resolve(f"{root}/step-{step}"))
                pool.release_save(seen, "reader")
            pool.delete_save(*pool.resolve(f"{root}/step-{step}"))
        until(lambda: saved(pool) == {})
