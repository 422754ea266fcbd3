"""Items that are compressed, or go through a stream extension: what is saved can be loaded, whatever they become."""

from __future__ import annotations

import bz2
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.metadata import Metadata

from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import URI, reader, writer
from torchcache.checkpoint import CacheStorageWriter, compression, stored
from torchcache.checkpoint.extensions import undo
from torchcache.checkpoint.lease import end_lease_of_thread
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.metadata import StorageInfo, stock_metadata
from torchcache.errors import CheckpointError, ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAME = 1_000_000


class Bzip2(StreamTransformExtension):
    """Packs what is all the same to less than zstd does."""

    @staticmethod
    def registry_name() -> str:
        return "stream.bzip2"

    @staticmethod
    def from_descriptor(version: str) -> Bzip2:
        return {"1": Bzip2}[version]()

    def get_descriptor(self) -> str:
        return "stream.bzip2/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast(IO[bytes], bz2.BZ2File(output, "wb"))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return cast(IO[bytes], bz2.BZ2File(input, "rb"))


def registry() -> ExtensionRegistry:
    made = ExtensionRegistry()
    made.register(Bzip2)
    return made


@pytest.fixture
def pool() -> Iterator[CheckpointPool]:
    yield CheckpointPool()
    end_lease_of_thread()


def kinds(pool: CheckpointPool) -> dict[str, str]:
    return {item.name: item.kind for item in Manifest.decode(pool.only_save().manifest, where="x").items}


# ---- what gets so small that readers would take it for a bomb ----


@pytest.fixture
def objects_of_a_kilobyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """What readers let any object become, were it packed ever so much: 1 KiB, or four times what is stored."""
    monkeypatch.setattr(compression, "_MOST_OF_AN_OBJECT", 1024)
    monkeypatch.setattr(compression, "_MOST_RATIO", 4)


@pytest.mark.usefixtures("objects_of_a_kilobyte")
def test_an_object_that_would_get_too_small_is_not_compressed(pool: CheckpointPool) -> None:
    half = bytes(torch.randint(0, 256, (SAME // 2,), generator=torch.Generator().manual_seed(1)).tolist())
    saved = {"same": "a" * SAME, "half": half + bytes(SAME // 2), "zeros": torch.zeros(SAME)}
    dcp.save(saved, storage_writer=writer(pool, compression="zstd"), no_dist=True)
    assert kinds(pool) == {"same": "bytes", "half": "zstd", "zeros": "zstd"}
    found = {"same": None, "half": None, "zeros": torch.ones(SAME)}
    dcp.load(found, storage_reader=reader(pool), no_dist=True)
    assert found["same"] == saved["same"] and found["half"] == saved["half"]
    assert torch.equal(cast(torch.Tensor, found["zeros"]), torch.zeros(SAME))


OBJECTS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: "a" * SAME,
    "opaque": lambda: torch.quantize_per_tensor(torch.zeros(SAME), 0.5, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("objects_of_a_kilobyte")
@pytest.mark.parametrize("kind", OBJECTS)
def test_a_stream_that_would_get_too_small_is_refused_before_it_is_saved(
    pool: CheckpointPool, kind: str
) -> None:
    with pytest.raises(
        dcp.CheckpointException, match=r"'x', an object of [\d,]+ bytes, becomes .*bzip2/1.*Save it"
    ):
        dcp.save({"x": OBJECTS[kind]()}, storage_writer=writer(pool, _extensions=[Bzip2()]), no_dist=True)
    assert not pool.saved


@pytest.mark.usefixtures("objects_of_a_kilobyte")
def test_a_tensor_in_a_stream_may_get_as_small_as_it_likes(pool: CheckpointPool) -> None:
    saved = {"zeros": torch.zeros(SAME), "few": "words"}
    dcp.save(saved, storage_writer=writer(pool, _extensions=[Bzip2()]), no_dist=True)
    assert set(kinds(pool).values()) == {"stream"}
    found = {"zeros": torch.ones(SAME), "few": None}
    dcp.load(found, storage_reader=reader(pool, _extension_registry=registry()), no_dist=True)
    assert torch.equal(cast(torch.Tensor, found["zeros"]), torch.zeros(SAME)) and found["few"] == "words"


def test_a_stream_that_packs_better_than_zstd_is_believed_where_it_can_be_undone(
    pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_MOST_RATIO", 100)
    dcp.save({"w": torch.zeros(SAME)}, storage_writer=writer(pool, _extensions=[Bzip2()]), no_dist=True)
    (item,) = Manifest.decode(pool.only_save().manifest, where="x").items
    assert item.length * stored._MOST_RATIO < 4 * SAME
    able, unable = reader(pool, _extension_registry=registry()), reader(pool)
    able.backing(able.read_metadata()).require(["w"])
    with pytest.raises(CheckpointError, match=r"bzip2/1 .*register them"):
        unable.backing(unable.read_metadata()).require(["w"])


# ---- what a torch, or a registry, doesn't have ----


def as_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: neither the module of extensions, nor a place for them in `.metadata`."""
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint._extension", None)
    monkeypatch.delitem(StorageInfo.__dataclass_fields__, "transform_descriptors")


def test_an_older_torch_refuses_what_it_cannot_write_or_read(
    pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"w": torch.zeros(SAME)}, storage_writer=writer(pool, compression="zstd"), no_dist=True)
    items = Manifest.decode(pool.only_save().manifest, where="x").items
    as_torch_2_6(monkeypatch)
    refused: list[dict[str, Any]] = [{"compression": "zstd"}, {"_extensions": [Bzip2()]}]
    for options in refused:
        with pytest.raises(ConfigurationError, match=r"need torch 2\.7"):
            CacheStorageWriter(URI, **options)
    assert CacheStorageWriter(URI, _extensions=[]).checkpoint_id == URI
    with pytest.raises(
        CheckpointError, match=r"'w' was saved through .*bzip2/1: load it with torch 2\.7 or newer"
    ):
        undo(b"", ["stream.bzip2/1"], None, tensor_bytes=None, name="w")
    with pytest.raises(
        CheckpointError, match=r"'w' was saved through stream.zstd/1.*use torch 2\.7 or newer"
    ):
        stock_metadata(Metadata({}), items, checkpoint_id=URI, save_id="s")


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [("stream.bzip2/2", "KeyError"), ("stream.other/1", "ValueError: Unknown")],
)
def test_an_extension_that_the_registry_cannot_give_is_named(descriptor: str, message: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"'w' was saved through .*{descriptor} \({message}.*register them"
    ):
        undo(b"", [descriptor], registry(), tensor_bytes=None, name="w")
