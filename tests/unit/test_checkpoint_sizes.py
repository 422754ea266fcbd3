"""Checkpoints that claim to be large, and one that is: memory is made for what is there, not for what is said."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import KEY, URI, adopt, reader, writer
from torchcache.checkpoint import manifest as manifests
from torchcache.checkpoint import reader as reading
from torchcache.checkpoint.agreement import Ranks
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.metadata import load_metadata
from torchcache.checkpoint.restoring import restore
from torchcache.checkpoint.resume import Record, record_name
from torchcache.errors import CheckpointError, IntegrityError
from torchcache.model import ObjectInfo

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.hostile("bombs"),
]

MANY = 10**9


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> CheckpointPool:
    monkeypatch.setattr(reading, "connect", lambda pool: pool)
    return CheckpointPool()


@pytest.fixture
def no_large_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives none of more than a million elements."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def checked(*size: Any, **options: Any) -> torch.Tensor:
        dimensions = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        assert torch.Size(dimensions).numel() <= 1_000_000, "memory was about to be made for a claim"
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", checked)
    yield


def claim(pool: CheckpointPool, folder: Path, name: str, size: tuple[int, ...], **info: Any) -> None:
    """A stock checkpoint in whose `.metadata` the tensor `name` is said to be of `size`."""
    dcp.save({"w": torch.ones(4), name: torch.ones(4)}, storage_writer=dcp.FileSystemWriter(folder))
    adopt(pool, folder)
    metadata = pickle.loads(pool.objects["s3", f"{KEY[1]}/.metadata"])
    entry = metadata.state_dict_metadata[name]
    entry.size = torch.Size(size)
    entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))]
    for index, where in metadata.storage_data.items():
        if index.fqn == name and info:
            metadata.storage_data[index] = _StorageInfo(where.relative_path, where.offset, **info)
    pool.put(f"{URI}/.metadata", pickle.dumps(metadata))


def restored(pool: CheckpointPool, state: dict[str, Any]) -> dict[str, Any]:
    restore(reader(pool, URI), state, Ranks(), rng=False)
    return state


@pytest.mark.usefixtures("no_large_tensors")
@pytest.mark.parametrize(
    ("size", "info", "message"),
    [
        ((MANY,), {}, r"said to be a tensor of \(1000000000,\), 4,000,000,000 bytes.* can be [\d,]+ at most"),
        ((MANY, MANY, MANY), {}, "refused before memory is made"),
        ((MANY,), {"length": 5 * MANY}, r"should end at byte \d+ of .*, which has \d+ bytes"),
        ((MANY,), {"length": 100, "transform_descriptors": ["stream.zstd/1"]}, "at most"),
        ((MANY,), {"length": 100, "transform_descriptors": ["stream.zstd/1"] * 2}, "at most"),
        (
            (MANY,),
            {"length": 100, "transform_descriptors": ["rot/1", "rot/2"]},
            "extensions rot/1, rot/2.*register",
        ),
    ],
    ids=["one", "three dimensions", "and so is its item", "compressed", "compressed twice", "transformed"],
)
def test_a_claimed_shape_gets_no_memory(
    pool: CheckpointPool, tmp_path: Path, size: Any, info: Any, message: str
) -> None:
    claim(pool, tmp_path / "s", "x", size, **info)
    with pytest.raises((IntegrityError, CheckpointError), match=message):
        restored(pool, {"w": torch.zeros(4), "x": None})
    assert torch.equal(restored(pool, {"w": torch.zeros(4)})["w"], torch.ones(4)), "the rest is as it was"


@pytest.mark.usefixtures("no_large_tensors")
def test_a_claimed_record_of_a_rank_gets_no_memory(pool: CheckpointPool, tmp_path: Path) -> None:
    claim(pool, tmp_path / "s", record_name(0), (MANY,))
    with pytest.raises(IntegrityError, match="refused before memory is made"):
        restored(pool, {"w": torch.zeros(4)})


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_our_own_checkpoints_bear_out_what_they_claim(pool: CheckpointPool, compression: str | None) -> None:
    saved = {"w": torch.arange(1000.0).view(10, 100), "z": torch.zeros(300_000), "e": torch.empty(0, 3)}
    record = Record(world_size=1).encode()
    dcp.save({**saved, record_name(0): record}, storage_writer=writer(pool, compression=compression))
    found = restored(pool, {"w": None, "z": None, "e": None})
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_of_metadata_no_more_than_a_bound_is_read(
    pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=dcp.FileSystemWriter(tmp_path / "s"))
    adopt(pool, tmp_path / "s")
    stat = pool.stat
    monkeypatch.setattr(pool, "stat", lambda uri: ObjectInfo(stat(uri).id, reading.MOST_METADATA_BYTES + 1))
    with pytest.raises(CheckpointError, match=r"at most 1,073,741,824 are read.*torch's own reader"):
        reader(pool).read_metadata()
    assert not pool.reads


def test_of_a_manifest_no_more_than_a_bound_is_made_or_read(
    pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=writer(pool))
    data = pool.only_save().manifest
    monkeypatch.setattr(manifests, "MOST_MANIFEST_BYTES", len(data) - 1)
    with pytest.raises(IntegrityError, match="bytes, and at most"):
        Manifest.decode(data, where="x")
    with pytest.raises(dcp.CheckpointException, match=r"too many items, 1: .*Save it in parts"):
        dcp.save({"w": torch.ones(4)}, storage_writer=writer(pool, path=f"{URI}-2"))
    assert len(pool.saved) == 1


@pytest.mark.parametrize("count", [8_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_many_entries_in_bounded_memory(count: int) -> None:
    properties = TensorProperties(dtype=torch.float32)
    names = [f"model.layers.{number:06}.weight" for number in range(count)]
    shape, nowhere = torch.Size([8]), torch.Size([0])
    metadata = Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(nowhere, shape)])
            for name in names
        },
        storage_data={
            MetadataIndex(name, nowhere, 0): _StorageInfo("__0_0.distcp", 64 * number, 64)
            for number, name in enumerate(names)
        },
    )
    data = pickle.dumps(metadata)
    del metadata
    tracemalloc.start()
    try:
        found = load_metadata(data, where="x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.storage_data is not None
    assert len(found.state_dict_metadata) == len(found.storage_data) == count
    assert peak < 30 * len(data)
