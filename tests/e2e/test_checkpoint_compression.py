"""Compressed checkpoints: what stock torch writes we read, what we write it reads; smaller where that is worth it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from safetensors.torch import load_file
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension, ZStandard

import torchcache as tc
from torchcache.checkpoint import Zstd
from torchcache.checkpoint.compression import decompress
from torchcache.checkpoint.export import SafetensorsExport
from torchcache.checkpoint.extensions import undo
from torchcache.errors import ConfigurationError, IntegrityError


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with tc.LocalPool(tmp_path_factory.mktemp("pool"), capacity="256MB") as pool:
        yield pool


def state() -> dict[str, Any]:
    chance = torch.Generator().manual_seed(5)
    return {
        "zeros": torch.zeros(300, 400),
        "halves": torch.arange(200_000.0).to(torch.bfloat16).view(400, 500),
        "noise": torch.randint(0, 256, (100_000,), dtype=torch.uint8, generator=chance),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "strided": torch.ones(64, 64).t()[::2],
        "object": {"words": ["the same"] * 1000, "n": 3},
    }


def blank() -> dict[str, Any]:
    made = {k: torch.full_like(v, 1) if isinstance(v, torch.Tensor) else None for k, v in state().items()}
    return {**made, "object": {"words": [], "n": 0}}


def same(found: dict[str, Any]) -> None:
    for name, value in state().items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, (
            name
        )


def saved(pool: Any, folder: Path, compression: Any) -> Path:
    with tc.CheckpointManager(folder, pool=pool, rng=False, compression=compression) as manager:
        manager.save(1, state())
        found = blank()
        manager.load(found, 1)
        same(found)
        manager.wait_durable(1, timeout_s=120)
    return folder / "step-1"


@pytest.mark.parametrize("compression", ["zstd", Zstd(level=1, threads=2)], ids=["plain", "settings"])
def test_stock_torch_reads_what_is_compressed(pool: Any, tmp_path: Path, compression: Any) -> None:
    folder = saved(pool, tmp_path / "run", compression)
    found = blank()
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    same(found)
    size = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    assert size < sum(t.nbytes for t in state().values() if isinstance(t, torch.Tensor)) * 0.6
    infos = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    packed = {index.fqn for index, info in infos.items() if info.transform_descriptors}
    assert packed >= {"zeros", "halves"}
    assert not packed & {"noise", "scalar"}


def test_what_stock_torch_compressed_is_read(pool: Any, tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "stock", _extensions=[ZStandard()])
    dcp.save(state(), storage_writer=writer, no_dist=True)
    found = blank()
    dcp.load(found, storage_reader=tc.CacheStorageReader(tmp_path / "stock", pool=pool), no_dist=True)
    same(found)


def test_another_number_of_rows_and_an_export(pool: Any, tmp_path: Path) -> None:
    folder = saved(pool, tmp_path / "run", "zstd")
    half = {
        "halves": torch.zeros(400, 500, dtype=torch.float32)
    }  # another dtype, so not straight into its memory
    dcp.load(half, storage_reader=tc.CacheStorageReader(folder, pool=pool), no_dist=True)
    assert torch.equal(half["halves"], state()["halves"].float())
    SafetensorsExport(
        tc.connect(pool), f"file://{folder}", str(tmp_path / "out"), max_file_bytes=1 << 30
    ).run(lambda *_: None)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in state().items() if isinstance(v, torch.Tensor))


def test_a_frame_that_claims_too_much_or_is_none_is_refused() -> None:
    huge = zstandard.ZstdCompressor().compress(bytes(70 << 20))
    with pytest.raises(IntegrityError, match="refused"):
        decompress(huge, tensor_bytes=None, name="w")
    with pytest.raises(IntegrityError, match="refused"):
        decompress(huge, tensor_bytes=1000, name="w")
    unsized = zstandard.ZstdCompressor().compressobj()
    frame = unsized.compress(bytes(70 << 20)) + unsized.flush()
    with pytest.raises(IntegrityError, match="refused"):
        decompress(frame, tensor_bytes=None, name="w")
    for bad in (b"", b"no frame at all", huge[: len(huge) // 2]):
        with pytest.raises(IntegrityError):
            decompress(bad, tensor_bytes=70 << 20, name="w")


@pytest.mark.parametrize("wrong", ["gzip", "", 3])
def test_what_is_no_compression(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="compression must be"):
        tc.CacheStorageWriter("/tmp/x", compression=wrong)
    with pytest.raises(ConfigurationError, match="levels"):
        Zstd(level=99)
    with pytest.raises(ConfigurationError, match="threads"):
        Zstd(threads=-2)


class Flipped(StreamTransformExtension):
    """Each byte's bits turned over: a transform that shows where it was left out."""

    class Stream(io.RawIOBase):
        def __init__(self, under: IO[bytes]) -> None:
            super().__init__()
            self._under = under

        def readable(self) -> bool:
            return True

        def writable(self) -> bool:
            return True

        def readinto(self, into: Any) -> int:
            data = flip(self._under.read(len(into)))
            into[: len(data)] = data
            return len(data)

        def write(self, data: Any) -> int:
            return self._under.write(flip(data))

        def close(self) -> None:
            super().close()
            self._under.close()

    @staticmethod
    def registry_name() -> str:
        return "stream.flipped"

    @staticmethod
    def from_descriptor(version: str) -> Flipped:
        assert version == "2"
        return Flipped()

    def get_descriptor(self) -> str:
        return "stream.flipped/2"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return Flipped.Stream(output)

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return Flipped.Stream(input)


def flip(data: Any) -> bytes:
    return bytes(byte ^ 255 for byte in bytes(data))


def registry() -> ExtensionRegistry:
    made = ExtensionRegistry()
    made.register(Flipped)
    return made


def small() -> dict[str, Any]:
    return {"w": torch.arange(5000.0), "strided": torch.ones(8, 8).t()[::2], "words": ["a", "b"]}


def small_blank() -> dict[str, Any]:
    return {"w": torch.zeros(5000), "strided": torch.zeros(4, 8), "words": None}


def same_small(found: dict[str, Any]) -> None:
    assert torch.equal(found["w"], small()["w"])
    assert torch.equal(found["strided"], small()["strided"])
    assert found["words"] == ["a", "b"]


CHAINS: dict[str, list[StreamTransformExtension]] = {
    "one": [Flipped()],
    "zstd": [ZStandard()],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_stream_extensions_of_the_users_own_both_ways(pool: Any, tmp_path: Path, chain: str) -> None:
    extensions = CHAINS[chain]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    writer = tc.CacheStorageWriter(ours, pool=pool, durability="store", _extensions=extensions)
    dcp.save(small(), storage_writer=writer, no_dist=True)
    dcp.save(small(), storage_writer=dcp.FileSystemWriter(theirs, _extensions=extensions), no_dist=True)
    stored = pickle.loads((ours / ".metadata").read_bytes()).storage_data
    wanted = [extension.get_descriptor() for extension in reversed(extensions)]
    assert {tuple(info.transform_descriptors) for info in stored.values()} == {tuple(wanted)}
    readers = [
        tc.CacheStorageReader(ours, pool=pool, _extension_registry=registry()),
        tc.CacheStorageReader(theirs, pool=pool, _extension_registry=registry()),
        dcp.FileSystemReader(ours, _extension_registry=registry()),
    ]
    for reader in readers:
        found = small_blank()
        dcp.load(found, storage_reader=reader, no_dist=True)
        same_small(found)
    if chain != "zstd":
        with pytest.raises(dcp.CheckpointException, match="_extension_registry"):
            dcp.load(small_blank(), storage_reader=tc.CacheStorageReader(ours, pool=pool), no_dist=True)


def test_several_extensions_stock_cannot_read_itself(tmp_path: Path) -> None:
    """So our writer refuses them; should torch mend it, this is where it is seen."""
    writer = dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard(), Flipped()])
    dcp.save(small(), storage_writer=writer, no_dist=True)
    reader = dcp.FileSystemReader(tmp_path, _extension_registry=registry())
    with pytest.raises(dcp.CheckpointException):
        dcp.load(small_blank(), storage_reader=reader, no_dist=True)


def test_a_stack_of_frames_that_becomes_too_much_is_refused() -> None:
    once = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    twice = zstandard.ZstdCompressor().compress(once)
    with pytest.raises(IntegrityError, match="refused"):
        undo(twice, ["stream.zstd/1", "stream.zstd/1"], None, tensor_bytes=1000, name="w")


def test_what_is_no_extension() -> None:
    with pytest.raises(ConfigurationError, match="StreamTransformExtension"):
        tc.CacheStorageWriter("/tmp/x", _extensions=["zstd"])
    with pytest.raises(ConfigurationError, match="give one"):
        tc.CacheStorageWriter("/tmp/x", _extensions=[ZStandard(), Flipped()])
    with pytest.raises(ConfigurationError, match="one of them"):
        tc.CacheStorageWriter("/tmp/x", compression="zstd", _extensions=[Flipped()])
