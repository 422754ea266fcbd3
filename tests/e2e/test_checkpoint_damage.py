"""A checkpoint whose bytes in the pool went bad: a load checks them all, and takes what lies in storage (F34)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from torchcache import save_names
from torchcache.errors import IntegrityError


def flip_a_byte_of_each_tensor(store: Path, tensors: dict[str, torch.Tensor]) -> int:
    """In the files of the pool that lies in `store`; returns how many were found."""
    found = 0
    for path in store.rglob("*.segment"):
        data = bytearray(path.read_bytes())
        for tensor in tensors.values():
            at = data.find(bytes(memoryview(tensor[-64:].numpy())))
            if at >= 0:
                data[at] ^= 4
                found += 1
        with path.open("r+b") as file:
            file.write(data)
    return found


@pytest.mark.parametrize("sound", [True, False])
def test_damage_in_the_pool_is_found_and_mended_from_sound_storage(
    tmp_path: Path, sound: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chance = torch.Generator().manual_seed(3)
    saved = {f"t{n}": torch.rand(1_500_000 + n, generator=chance) for n in range(3)}
    home = tmp_path / "home"
    with (
        tc.LocalPool(tmp_path / "pool", capacity="256MB") as pool,
        tc.CheckpointManager(f"file://{home}", pool=pool, rng=False) as manager,
    ):
        manager.save(1, dict(saved))
        manager.wait_durable(1, timeout_s=120)
        if not sound:
            for shard in home.rglob("*.distcp"):
                shard.write_bytes(b"\0" * shard.stat().st_size)
        assert flip_a_byte_of_each_tensor(tmp_path / "pool", saved) >= len(saved)
        into = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
        if sound:
            manager.load(into, 1)
            assert all(torch.equal(into[name], saved[name]) for name in saved)
            warned = [
                record.args[1]
                for record in caplog.records
                if record.name == "torchcache.checkpoint.source" and record.levelno == logging.WARNING
            ]
            shards = {shard.name for shard in home.rglob("*.distcp")}
            assert len(warned) == len(set(warned)), "once a file"
            assert warned
            assert set(warned) <= shards
            caplog.clear()
            manager.load({name: torch.zeros_like(tensor) for name, tensor in saved.items()}, 1)
        else:
            with pytest.raises(IntegrityError):
                manager.load(into, 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_manifest_in_storage_that_is_too_large_is_not_fetched(tmp_path: Path) -> None:
    home = tmp_path / "home"
    # Too much for a message.
    saved = {f"w{number:05}" + "x" * 1000: torch.zeros(1) for number in range(2_500)}
    with tc.LocalPool(tmp_path / "one", capacity="64MB") as one:
        dcp.save(saved, storage_writer=tc.CacheStorageWriter(home, pool=one, durability="store"))
    manifest = home / save_names.MANIFEST_NAME
    assert manifest.stat().st_size > 2 << 20
    with manifest.open("r+b") as file:
        file.truncate(save_names.MOST_MANIFEST_BYTES + 1)  # a hole: no more of the disk than before
    with tc.LocalPool(tmp_path / "two", capacity="64MB") as two:
        connected = tc.connect(two)
        with pytest.raises(IntegrityError):
            connected.get_save(*connected.resolve(f"file://{home}"))
