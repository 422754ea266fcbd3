"""CacheStorageReader over a pool in memory: where bytes come from, how many, whether right, and what is refused."""

from __future__ import annotations

import gc
import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, WriteItem

from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import (
    KEY,
    URI,
    Settings,
    adopt,
    assert_same,
    blank,
    reader,
    state,
    writer,
)
from torchcache.checkpoint import CacheStorageReader
from torchcache.checkpoint.garbage import MANY_ITEMS
from torchcache.checkpoint.lease import end_lease_of_thread
from torchcache.checkpoint.manifest import Manifest
from torchcache.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    NotCommitted,
    ObjectNotFound,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.model import ObjectId

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")

MIB = 1 << 20


@pytest.fixture
def pool() -> Iterator[CheckpointPool]:
    yield CheckpointPool()
    end_lease_of_thread()


def load(pool: CheckpointPool, into: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(into, storage_reader=reader(pool, **options))
    return into


def failure(raised: pytest.ExceptionInfo[dcp.CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


def spoil(pool: CheckpointPool, *, saved: bool = True, stored: bool = False, at: int = -2000) -> None:
    """Flips a byte of each file of the save, in the pool's copy, the under-store's or both."""
    for files in ([pool.save_files] if saved else []) + ([pool.objects] if stored else []):
        for key, data in files.items():
            if str(key).find(".distcp") >= 0:
                damaged = bytearray(data)
                damaged[at] ^= 1
                files[key] = bytes(damaged)  # type: ignore[index]


# ---- where bytes come from ----


def test_many_items_are_loaded_while_the_collector_waits_and_no_longer(pool: CheckpointPool) -> None:
    saved = {f"w{number:04}": torch.full((2,), float(number)) for number in range(MANY_ITEMS)}
    dcp.save(saved, storage_writer=writer(pool))
    waited: list[bool] = []

    class Planner(DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            waited.append(not gc.isenabled())
            return super().create_local_plan()

    into = blank(saved)
    dcp.load(into, storage_reader=reader(pool), planner=Planner())
    assert waited == [True]
    assert gc.isenabled()
    assert_same(into, saved)


def test_the_pools_own_save_comes_first(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    assert_same(load(pool, blank(state())), state())
    assert not pool.objects


def test_a_durable_save_that_left_the_pool_is_read_from_the_store(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    pool.upload(*KEY)
    pool.evict()
    assert_same(load(pool, blank(state())), state())
    assert {e.object.id.version[:5] for e in pool.reads[-1]} != {"save:"}


def test_a_save_that_became_durable_and_was_evicted_while_loading(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    one = reader(pool)
    original = one.read_metadata

    def read_metadata(*args: Any, **kwargs: Any) -> Any:
        metadata = original()
        pool.upload(*KEY)
        pool.evict()
        return metadata

    one.read_metadata = read_metadata  # type: ignore[method-assign]
    loaded = blank(state())
    dcp.load(loaded, storage_reader=one)
    assert_same(loaded, state())


def test_a_save_that_was_overwritten_while_loading_is_not_mixed(pool: CheckpointPool) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=writer(pool))
    one = reader(pool)
    metadata = one.read_metadata()
    one.set_up_storage_reader(metadata, True)
    pool.evict()
    dcp.save({"a": torch.zeros(3)}, storage_writer=writer(pool, overwrite=True))
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"a": torch.ones(3)}, metadata, True)
    with pytest.raises(CheckpointError, match="was overwritten while it was being loaded"):
        one.read_data(planner.create_local_plan(), planner)


@pytest.mark.parametrize("length", [3, 30_000])
def test_a_durable_save_that_was_overwritten_while_loading_is_not_called_damaged(
    pool: CheckpointPool, length: int
) -> None:
    """I3: the files of the new save lie where those of the old one lay, whether of their size or not."""
    dcp.save({"a": torch.ones(3)}, storage_writer=writer(pool))
    pool.upload(*KEY)
    one = reader(pool)
    metadata = one.read_metadata()
    one.set_up_storage_reader(metadata, True)
    dcp.save({"a": torch.zeros(length)}, storage_writer=writer(pool, overwrite=True))
    pool.upload(*KEY)
    pool.evict()
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"a": torch.ones(3)}, metadata, True)
    with pytest.raises(CheckpointError, match="was overwritten while it was being loaded"):
        one.read_data(planner.create_local_plan(), planner)


def test_ranks_that_found_different_saves_do_not_mix_them(pool: CheckpointPool) -> None:
    """Every rank looks for itself, and the path may be overwritten between two looks."""
    plans: list[LoadPlan] = []
    for value in (1.0, 2.0):
        dcp.save({"a": torch.full((3,), value)}, storage_writer=writer(pool, overwrite=True))
        rank = reader(pool)
        rank.set_up_storage_reader(rank.read_metadata(), not plans)
        plans.append(rank.prepare_local_plan(LoadPlan([])))
    assert rank.prepare_global_plan(plans[1:]) == plans[1:]
    with pytest.raises(CheckpointError, match="was overwritten while it was being loaded"):
        rank.prepare_global_plan(plans)


def test_metadata_of_a_save_that_was_overwritten_since_is_refused(pool: CheckpointPool) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=writer(pool))
    metadata = reader(pool).read_metadata()
    dcp.save({"a": torch.zeros(3)}, storage_writer=writer(pool, overwrite=True))
    with pytest.raises(CheckpointError, match="was overwritten while it was being loaded"):
        reader(pool).set_up_storage_reader(metadata, True)


def test_a_save_that_is_nowhere_any_more_says_so(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    pool.evict()
    with pytest.raises(dcp.CheckpointException, match="isn't here"):
        load(pool, blank(state()))


@pytest.mark.parametrize("threads", [1, 3])
def test_checkpoints_of_torch_itself_load(pool: CheckpointPool, tmp_path: Path, threads: int) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "s", thread_count=threads))
    adopt(pool, tmp_path / "s")
    assert_same(load(pool, blank(state())), state())


def test_a_stock_blob_is_read_once_for_all_who_want_a_part(pool: CheckpointPool, tmp_path: Path) -> None:
    weight = torch.arange(64.0).reshape(8, 8)
    dcp.save({"w": weight}, storage_writer=dcp.FileSystemWriter(tmp_path / "s"))
    adopt(pool, tmp_path / "s")
    one = reader(pool)
    one.set_up_storage_reader(one.read_metadata(), True)
    target = torch.zeros(8, 8)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"w": target}, one.read_metadata(), True)
    index = MetadataIndex("w", [0, 0])
    plan = LoadPlan(
        [
            ReadItem(
                LoadItemType.TENSOR,
                MetadataIndex("w"),
                torch.Size(at),
                index,
                torch.Size(at),
                torch.Size([4, 8]),
            )
            for at in ([0, 0], [4, 0])
        ]
    )
    one.read_data(plan, planner)
    assert torch.equal(target, weight)
    assert len(pool.extents_of(".distcp")) == 1


def test_no_checkpoint_says_so(pool: CheckpointPool) -> None:
    with pytest.raises(NotCommitted, match=r"no committed checkpoint at s3://bucket/run/step-1"):
        reader(pool).read_metadata()
    with pytest.raises(dcp.CheckpointException, match="no committed checkpoint"):
        load(pool, {"a": 1})


def test_a_withdrawn_metadata_is_none(pool: CheckpointPool) -> None:
    pool.put(f"{URI}/.metadata", b"")
    with pytest.raises(NotCommitted):
        reader(pool).read_metadata()


# ---- how many bytes ----


def test_whole_tensors_go_straight_into_their_targets(pool: CheckpointPool) -> None:
    weight = torch.randn(100, 50)
    dcp.save({"w": weight}, storage_writer=writer(pool))
    target = torch.zeros(100, 50)
    destinations: list[memoryview] = []
    original = pool.read_each

    def read_each(extents: Any, *, into: Any = None, **options: Any) -> Any:
        destinations.extend(into)
        return original(extents, into=into, **options)

    pool.read_each = read_each  # type: ignore[method-assign]
    load(pool, {"w": target})
    assert torch.equal(target, weight)
    (destination,) = destinations
    destination[:4] = b"\0\0\0\0"
    assert target[0, 0] == 0.0  # it is the tensor's memory


def read_part(pool: CheckpointPool, target: torch.Tensor, offsets: list[int]) -> None:
    """Loads the box of "w" of `target`'s size at `offsets`, as resharding does."""
    one = reader(pool)
    metadata = one.read_metadata()
    one.set_up_storage_reader(metadata, True)
    zeros = [0] * target.dim()
    planner = DefaultLoadPlanner()
    planner.state_dict = {"w": target}
    item = ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex("w"),
        torch.Size(zeros),
        MetadataIndex("w", zeros),
        torch.Size(offsets),
        target.size(),
    )
    one.read_data(LoadPlan([item]), planner)


@pytest.mark.parametrize("durable", [False, True])
def test_narrowed_rows_fetch_only_their_rows(pool: CheckpointPool, durable: bool) -> None:
    weight = torch.arange(3 * MIB, dtype=torch.int64).reshape(6, MIB // 2)  # rows of 4 MiB
    dcp.save({"w": weight}, storage_writer=writer(pool))
    if durable:
        pool.upload(*KEY)
        pool.evict()
    target = torch.zeros(2, MIB // 2, dtype=torch.int64)
    read_part(pool, target, [2, 0])
    assert torch.equal(target, weight[2:4])
    assert sum(e.length for e in pool.reads[-1]) == target.nbytes


def test_narrowed_columns_fetch_only_their_columns(pool: CheckpointPool) -> None:
    weight = torch.arange(4 * MIB, dtype=torch.int32).reshape(16, MIB // 4)  # rows of 1 MiB
    dcp.save({"w": weight}, storage_writer=writer(pool))
    target = torch.zeros(16, MIB // 16, dtype=torch.int32)
    read_part(pool, target, [0, MIB // 8])
    assert torch.equal(target, weight[:, MIB // 8 : MIB // 8 + MIB // 16])
    assert sum(e.length for e in pool.reads[-1]) == target.nbytes


def test_a_narrowed_read_from_the_store_is_verified_in_whole_granules(pool: CheckpointPool) -> None:
    weight = torch.arange(3 * MIB, dtype=torch.int64).reshape(-1, 16)  # 24 MiB
    dcp.save({"w": weight}, storage_writer=writer(pool))
    pool.upload(*KEY)
    pool.evict()
    target = torch.zeros(10, 16, dtype=torch.int64)
    read_part(pool, target, [100_000, 0])
    assert torch.equal(target, weight[100_000:100_010])
    assert sum(e.length for e in pool.extents_of(".distcp") if not e.object.id.is_save) == 4 * MIB


def test_large_tensors_are_read_in_pieces(pool: CheckpointPool) -> None:
    weight = torch.arange(80 * MIB, dtype=torch.uint8)
    dcp.save({"w": weight, "x": torch.ones(3)}, storage_writer=writer(pool))
    assert_same(load(pool, blank({"w": weight, "x": torch.ones(3)})), {"w": weight, "x": torch.ones(3)})
    assert max(sum(e.length for e in read) for read in pool.reads) <= 32 * MIB


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(30, 50).t(),
        torch.zeros(50, 60)[:, ::2],
        torch.zeros(50, 30, dtype=torch.float64),
        torch.zeros(50, 30, dtype=torch.bfloat16),
    ],
    ids=["transposed", "strided", "wider", "narrower"],
)
def test_targets_of_any_layout_and_dtype(pool: CheckpointPool, target: torch.Tensor) -> None:
    weight = state()["model"]["weight"]
    dcp.save({"w": weight}, storage_writer=writer(pool))
    load(pool, {"w": target})
    assert torch.equal(target, weight.to(target.dtype))


def test_a_target_of_inference_mode(pool: CheckpointPool) -> None:
    dcp.save({"w": torch.arange(6.0).reshape(2, 3)}, storage_writer=writer(pool))
    with torch.inference_mode():
        targets = {"w": torch.zeros(3, 2).t()}
        load(pool, targets)
    assert targets["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_parameters_load_in_place(pool: CheckpointPool) -> None:
    model = torch.nn.Linear(3, 2)
    dcp.save(model.state_dict(), storage_writer=writer(pool))
    other = torch.nn.Linear(3, 2)
    target = other.state_dict()
    load(pool, target)
    assert torch.equal(other.weight, model.weight) and other.weight.requires_grad


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_without_row_major_bytes_load_as_torch_loads_them(pool: CheckpointPool) -> None:
    quantised = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
    dcp.save({"q": quantised}, storage_writer=writer(pool))
    target = {"q": torch.quantize_per_tensor(torch.zeros(4), 0.5, 0, torch.qint8)}
    load(pool, target)
    assert torch.equal(target["q"].dequantize(), quantised.dequantize())


def test_a_planner_that_makes_its_targets_late(pool: CheckpointPool) -> None:
    class Late(DefaultLoadPlanner):
        made: dict[str, torch.Tensor]

        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            return torch.empty_like(super().resolve_tensor(read_item), device="cpu")

        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            self.made = {read_item.dest_index.fqn: tensor}

    dcp.save({"w": torch.arange(5.0)}, storage_writer=writer(pool))
    planner = Late()
    dcp.load({"w": torch.zeros(5)}, storage_reader=reader(pool), planner=planner)
    assert planner.made["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


# ---- whether they are right ----


def test_a_damaged_pool_copy_is_replaced_by_the_stores_f34(pool: CheckpointPool) -> None:
    tensors = {"w": torch.arange(10_000.0)}
    dcp.save(tensors, storage_writer=writer(pool))
    pool.upload(*KEY)
    spoil(pool)
    assert_same(load(pool, blank(tensors)), tensors)


@pytest.mark.parametrize("durable", [False, True])
def test_damage_without_a_good_copy_is_an_error_that_names_the_file_f34(
    pool: CheckpointPool, durable: bool
) -> None:
    tensors = {"w": torch.arange(10_000.0)}
    dcp.save(tensors, storage_writer=writer(pool))
    if durable:
        pool.upload(*KEY)
    spoil(pool, stored=durable)
    with pytest.raises(dcp.CheckpointException, match=r"'w' in file __0_0\.distcp does not match") as raised:
        load(pool, blank(tensors))
    assert isinstance(failure(raised), IntegrityError)


def test_a_store_that_lost_or_changed_a_file_is_an_error_that_names_it(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    pool.upload(*KEY)
    pool.evict()
    pool.put(f"{URI}/__0_0.distcp", b"short")
    with pytest.raises(
        dcp.CheckpointException, match=r"__0_0\.distcp has 5 bytes, but the checkpoint's manifest says"
    ):
        load(pool, blank(state()))
    pool.delete(f"{URI}/__0_0.distcp")
    with pytest.raises(
        dcp.CheckpointException, match=r"there is no s3://bucket/run/step-1/__0_0\.distcp"
    ) as raised:
        load(pool, blank(state()))
    assert isinstance(failure(raised), ObjectNotFound)


def test_a_corrupt_manifest_is_refused_f33(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    info = pool.only_save()
    pool.saved[*KEY, ""] = replace(info, manifest=info.manifest.replace(b'"step"', b'"stop"'))
    with pytest.raises(IntegrityError, match=r"s3://bucket/run/step-1.*checksum is wrong"):
        reader(pool).read_metadata()


def test_a_manifest_of_another_save_is_refused(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    pool.saved[*KEY, ""] = replace(pool.only_save(), save_id="other")
    with pytest.raises(IntegrityError, match="belongs to another save"):
        reader(pool).read_metadata()


def test_a_manifest_whose_sizes_do_not_fit_its_dtype_is_refused(pool: CheckpointPool) -> None:
    dcp.save({"w": torch.ones(8)}, storage_writer=writer(pool))
    info = pool.only_save()
    manifest = Manifest.decode(info.manifest, where="x")
    lying = replace(manifest, items=(replace(manifest.items[0], dtype="float64"),))
    pool.saved[*KEY, ""] = replace(info, manifest=lying.encode())
    with pytest.raises(dcp.CheckpointException, match="too few or many for its shape"):
        load(pool, {"w": torch.zeros(8)})


def test_an_error_of_the_pool_is_raised(pool: CheckpointPool) -> None:
    tensors = {f"w{i}": torch.zeros(20 * MIB, dtype=torch.uint8) for i in range(4)}
    dcp.save(tensors, storage_writer=writer(pool))
    pool.upload(*KEY)
    pool.evict()
    for name in Manifest.decode(pool.only_save().manifest, where="x").files:
        pool.errors[f"{URI}/{name}"] = ServerUnavailable("the server is gone")
    with pytest.raises(dcp.CheckpointException, match="the server is gone") as raised:
        load(pool, blank(tensors))
    assert isinstance(failure(raised), TorchCacheError)


# ---- what is refused ----


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.witness,))


def test_an_evil_stock_metadata_is_refused_and_not_executed(pool: CheckpointPool, tmp_path: Path) -> None:
    pool.put(f"{URI}/.metadata", pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match="refused, and not executed"):
        reader(pool).read_metadata()
    with pytest.raises(dcp.CheckpointException, match="refused, and not executed"):
        load(pool, {"a": 1})
    assert not (tmp_path / "executed").exists()


def evil_save(pool: CheckpointPool, witness: Path) -> None:
    class Planner(DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            return io.BytesIO(pickle.dumps(Evil(witness)))

    dcp.save({"a": 1}, storage_writer=writer(pool), planner=Planner())


def test_an_evil_object_is_refused_and_not_executed(pool: CheckpointPool, tmp_path: Path) -> None:
    evil_save(pool, tmp_path / "executed")
    with pytest.raises(dcp.CheckpointException, match=r"'a'.*allow_pickle=True"):
        load(pool, {"a": None})
    assert not (tmp_path / "executed").exists()


def test_an_object_of_a_class_of_ones_own_names_the_ways_out(pool: CheckpointPool) -> None:
    dcp.save({"settings": Settings(3)}, storage_writer=writer(pool))
    with pytest.raises(
        dcp.CheckpointException,
        match=r"'settings' refers to .*Settings.*add_safe_globals.*CacheStorageReader\(\.\.\., allow_pickle=True\)",
    ) as raised:
        load(pool, {"settings": None})
    assert isinstance(failure(raised), CheckpointError)
    with torch.serialization.safe_globals([Settings]):
        assert load(pool, {"settings": None})["settings"].value == 3
    assert load(pool, {"settings": None}, allow_pickle=True)["settings"].value == 3


def test_a_planner_of_ones_own_reads_its_own_bytes_if_allowed(pool: CheckpointPool) -> None:
    class Save(DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            return io.BytesIO(b"mine: %d" % object)

    class Load(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            self.original_state_dict["a"] = value.read()

    dcp.save({"a": 7}, storage_writer=writer(pool), planner=Save())
    loaded = {"a": None}
    dcp.load(loaded, storage_reader=reader(pool, allow_pickle=True), planner=Load())
    assert loaded == {"a": b"mine: 7"}


def test_the_planner_gets_what_the_safe_loader_made(pool: CheckpointPool) -> None:
    """Not the stored bytes: a pickle that the two loaders understood differently would be executed."""
    dcp.save({"a": [1, 2]}, storage_writer=writer(pool))
    received: list[bytes] = []

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            received.append(value.getvalue())
            super().load_bytes(read_item, value)

    loaded = {"a": None}
    dcp.load(loaded, storage_reader=reader(pool), planner=Planner())
    assert loaded == {"a": [1, 2]}
    assert torch.load(io.BytesIO(received[0]), weights_only=True) == [1, 2]


def stock_with(pool: CheckpointPool, tmp_path: Path, info: Any) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=dcp.FileSystemWriter(tmp_path / "s"))
    adopt(pool, tmp_path / "s")
    metadata = pickle.loads(pool.objects["s3", f"{KEY[1]}/.metadata"])
    metadata.storage_data = {index: info for index in metadata.storage_data}
    metadata.storage_meta = StorageMeta()
    pool.put(f"{URI}/.metadata", pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            _StorageInfo("__0_0.distcp", 0, 1 << 60),
            r"should end at byte \d+ of .*__0_0\.distcp, which has \d+ bytes",
        ),
        (_StorageInfo("__0_0.distcp", 0, 10, ["rot/1"]), r"stream extensions rot/1 .*_extension_registry"),
        (_StorageInfo("__0_0.distcp", 0, 10, ["stream.zstd/1"] * 2), "through its stream extensions"),
        (_StorageInfo("__0_0.distcp", 0, 10, [7]), "bad transforms"),
        (_StorageInfo("__0_0.distcp", 0, 100), "'w' can't be loaded with weights_only=True"),
        (_StorageInfo("__9_0.distcp", 0, 100), r"there is no .*__9_0\.distcp"),
    ],
    ids=["length", "extension", "no frames", "no extension", "cut", "missing"],
)
def test_a_stock_checkpoint_that_lies_is_refused(
    pool: CheckpointPool, tmp_path: Path, info: Any, message: str
) -> None:
    stock_with(pool, tmp_path, info)
    with pytest.raises(dcp.CheckpointException, match=message):
        load(pool, {"w": torch.zeros(4)})


def test_another_size_than_saved_is_refused(pool: CheckpointPool) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=writer(pool))
    with pytest.raises(CheckpointError, match=r"\(3,\) into a tensor of \(2,\)"):
        one = reader(pool)
        one.set_up_storage_reader(one.read_metadata(), True)
        planner = DefaultLoadPlanner()
        planner.state_dict = {"w": torch.zeros(2)}
        sizes = (torch.Size([0]), MetadataIndex("w", [0]), torch.Size([0]), torch.Size([3]))

        class Careless(DefaultLoadPlanner):
            def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
                return torch.zeros(2)

        one.read_data(LoadPlan([ReadItem(LoadItemType.TENSOR, MetadataIndex("w"), *sizes)]), Careless())


# ---- the contract ----


def test_metadata_is_what_torch_would_have_read(pool: CheckpointPool, tmp_path: Path) -> None:
    saved_by, read_by = writer(pool), reader(pool)
    dcp.save(state(), storage_writer=saved_by)
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "s"))
    ours: Any = read_by.read_metadata()
    theirs: Any = dcp.FileSystemReader(tmp_path / "s").read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    assert (ours.storage_meta.save_id, ours.storage_meta.checkpoint_id) == (pool.only_save().save_id, URI)
    assert (ours.storage_meta.save_id, ours.storage_meta.load_id) == (saved_by.save_id, read_by.load_id)
    assert read_by.load_id


def test_metadata_read_by_another_instance_will_do(pool: CheckpointPool) -> None:
    """Some frameworks read it on one rank and hand it to the others."""
    dcp.save({"w": torch.arange(3.0)}, storage_writer=writer(pool))
    metadata = pickle.loads(pickle.dumps(reader(pool).read_metadata()))
    one = reader(pool)
    one.set_up_storage_reader(metadata, False)
    target = {"w": torch.zeros(3)}
    planner = DefaultLoadPlanner()
    planner.set_up_planner(target, metadata, False)
    one.read_data(planner.create_local_plan(), planner)
    assert target["w"].tolist() == [0.0, 1.0, 2.0]


def test_a_ranks_part_is_not_loaded_after_a_passing_error(pool: CheckpointPool) -> None:
    """torch falls back to it after any error; then this rank alone leaves the collectives, and the others hang."""
    one = reader(pool)

    def unavailable(*args: Any) -> Any:
        raise ServerUnavailable("restarting")

    original, pool.get_save = pool.get_save, unavailable  # type: ignore[method-assign]
    with pytest.raises(ServerUnavailable):
        one.read_metadata()
    pool.get_save = original  # type: ignore[method-assign]
    with pytest.raises(ServerUnavailable):
        one.read_metadata(rank=1)
    one.reset()
    with pytest.raises(NotCommitted):
        one.read_metadata(rank=1)


def test_state_dicts_are_rebuilt_from_what_is_there(pool: CheckpointPool) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    dcp.save(state(), storage_writer=writer(pool))
    whole = _load_state_dict_from_keys(storage_reader=reader(pool))
    assert_same(whole, state())
    some = _load_state_dict_from_keys({"optimizer"}, storage_reader=reader(pool))
    assert_same(some, {"optimizer": state()["optimizer"]})


def test_reading_needs_setting_up(pool: CheckpointPool) -> None:
    with pytest.raises(CheckpointError, match="set_up_storage_reader"):
        reader(pool).read_data(LoadPlan([]), DefaultLoadPlanner())


def test_a_reader_pickles(pool: CheckpointPool) -> None:
    one = reader(pool, allow_pickle=True)
    dcp.save({"a": 1}, storage_writer=writer(pool))
    one.read_metadata()
    again = pickle.loads(pickle.dumps(one))
    assert (again.path, again.allow_pickle, again._pool) == (URI, True, None)
    assert repr(again) == f"CacheStorageReader('{URI}')"


def test_reset_goes_on_with_another_checkpoint(pool: CheckpointPool) -> None:
    for step in (1, 2):
        dcp.save({"step": step}, storage_writer=writer(pool, f"s3://bucket/{step}"))
    one = reader(pool, "s3://bucket/1")
    for step in (2, 1):
        loaded = {"step": None}
        dcp.load(loaded, storage_reader=one, checkpoint_id=f"s3://bucket/{step}")
        assert loaded == {"step": step}
    with pytest.raises(ConfigurationError):
        one.reset("s3://")


def test_checkpoint_ids_are_judged_by_their_form() -> None:
    assert CacheStorageReader.validate_checkpoint_id("s3://bucket/x")
    assert CacheStorageReader.validate_checkpoint_id(Path("/x"))
    assert not CacheStorageReader.validate_checkpoint_id("gs://bucket/x")


def test_another_saves_files_are_not_taken_for_this_ones(pool: CheckpointPool) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=writer(pool))
    other = ObjectId("s3", f"{KEY[1]}/__0_0.distcp", "save:other")
    pool.save_files = {other: next(iter(pool.save_files.values()))}
    with pytest.raises(dcp.CheckpointException):
        load(pool, {"w": torch.zeros(4)})


def test_a_save_is_held_while_it_is_read_and_no_longer(pool: CheckpointPool) -> None:
    """So that retention doesn't delete it."""
    held: list[set[str]] = []

    class Watched(DefaultLoadPlanner):
        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            held.append(set(pool.holds.values()))

    dcp.save(state(), storage_writer=writer(pool))
    dcp.load(blank(state()), storage_reader=reader(pool), planner=Watched())
    assert held
    assert all(ids == {pool.only_save().save_id} for ids in held)
    assert not pool.holds
    opened = reader(pool)
    opened.read_metadata()
    assert pool.holds  # from the moment it is opened
    opened.reset()
    assert not pool.holds


def test_a_save_that_is_being_deleted_is_not_opened(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))

    def refuse(*_: object) -> float:
        raise NotCommitted("it is being deleted")

    pool.hold_save = refuse  # type: ignore[method-assign]
    with pytest.raises(dcp.CheckpointException, match="it is being deleted"):
        dcp.load(blank(state()), storage_reader=reader(pool))


def test_a_pool_that_cannot_be_told_of_readers_serves_them_all_the_same(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))

    def refuse(*_: object) -> float:
        raise ConfigurationError("the server doesn't know this call")

    pool.hold_save = pool.release_save = refuse  # type: ignore[assignment,method-assign]
    loaded = blank(state())
    dcp.load(loaded, storage_reader=reader(pool))
    assert_same(loaded, state())


@pytest.mark.parametrize(
    "planner_data",
    [{"dict": [[[1], 2]]}, {"set": []}, {"dict": 7}, {"a": 1, "b": 2}, {"tuple": None}],
)
def test_planner_data_that_makes_no_sense_is_an_integrity_error(
    pool: CheckpointPool, planner_data: object
) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    info = pool.only_save()
    manifest = replace(Manifest.decode(info.manifest, where="x"), planner_data=planner_data)
    pool.saved[*KEY, ""] = replace(info, manifest=manifest.encode())
    with pytest.raises(IntegrityError, match="planner_data is damaged"):
        reader(pool).read_metadata()


def test_a_manifest_that_claims_a_terabyte_gets_no_memory_for_it(pool: CheckpointPool) -> None:
    """Its file in the under-store is as small as ever."""
    dcp.save({"note": "x" * 100}, storage_writer=writer(pool))
    pool.upload(*KEY)
    pool.evict()
    info = pool.only_save()
    manifest = Manifest.decode(info.manifest, where="x")
    (item,) = manifest.items
    size = 1 << 40
    large = replace(
        item,
        kind="bytes",
        length=size,
        payload_start=0,
        payload_length=size,
        digests=(0,) * (size // (4 * MIB)),
    )
    lying = replace(manifest, items=(large,), files={item.file: size})
    pool.saved[*KEY, ""] = replace(pool.only_save(), manifest=lying.encode())
    with pytest.raises(dcp.CheckpointException, match="was changed after it was saved"):
        dcp.load({"note": None}, storage_reader=reader(pool))
