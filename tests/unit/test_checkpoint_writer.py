"""CacheStorageWriter, step by step and through torch, over a pool in memory."""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import AsyncStager

from tests.collected import until_collected
from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import KEY, URI, assert_same, blank, folder_of, reader, state, writer
from tests.waiting import until
from torchcache.checkpoint import CacheStorageWriter
from torchcache.checkpoint.frame import bytes_of
from torchcache.checkpoint.lease import end_lease_of_thread
from torchcache.checkpoint.manifest import Item, Manifest
from torchcache.checkpoint.ticket import Ticket, forget_arrived
from torchcache.errors import (
    AlreadyExists,
    CheckpointError,
    ConfigurationError,
    DeadlineExceeded,
    OutOfSpace,
    ServerUnavailable,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def pool() -> Iterator[CheckpointPool]:
    yield CheckpointPool()
    end_lease_of_thread()


def renewing() -> bool:
    return any(thread.name == "torchcache-lease" for thread in threading.enumerate())


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"durability": "disk"}, "durability must be 'pool' or 'store', not 'disk'"),
        ({"replicas": 0}, "replicas=0: give 1 or more, or None"),
        ({"compression": "gzip"}, "compression must be None, 'zstd' or a Zstd"),
    ],
)
def test_what_is_not_available_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CacheStorageWriter(URI, **options)


def test_one_replica_is_what_there_is() -> None:
    assert CacheStorageWriter(URI, replicas=1, compression=None).checkpoint_id == URI


def test_torch_takes_a_writer_for_its_own_stager() -> None:
    """Else it copies the state into memory that is new each time."""
    assert isinstance(CacheStorageWriter(URI), AsyncStager)


# ---- what is written ----


def test_stock_reader_loads_what_was_saved(pool: CheckpointPool, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    pool.upload(*KEY)
    loaded = blank(state())
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder_of(pool, tmp_path / "c")))
    assert_same(loaded, state())


def test_stock_tools_convert_what_was_saved(pool: CheckpointPool, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save(state(), storage_writer=writer(pool))
    pool.upload(*KEY)
    dcp_to_torch_save(folder_of(pool, tmp_path / "c"), tmp_path / "all.pt")
    assert_same(torch.load(tmp_path / "all.pt", weights_only=True), state())


def test_files_are_written_durably_in_the_saves_own_namespace(pool: CheckpointPool) -> None:
    dcp.save(state(), storage_writer=writer(pool))
    save_id = pool.only_save().save_id
    assert len(save_id) == 32
    ((namespace, object, durable, _),) = pool.writes
    assert namespace == f"save:s3/bucket/run/step-1@{save_id}"
    assert (object.key, object.version) == ("bucket/run/step-1/__0_0.distcp", f"save:{save_id}")
    assert durable
    manifest = Manifest.decode(pool.only_save().manifest, where="x")
    assert manifest.save_id == save_id
    assert pool.committed[(*KEY, "")][0] == list(manifest.files.items())
    assert all(item.start % 64 == 0 for item in manifest.items)
    assert all((item.start + item.payload_start) % 64 == 0 for item in manifest.items if item.payload_length)


def test_tensors_bytes_go_from_their_own_memory(pool: CheckpointPool) -> None:
    """No copy on the way: the buffer that is handed to the pool is the tensor's memory."""
    tensor = torch.arange(1000, dtype=torch.float32)
    handed: list[memoryview] = []
    original = pool.write

    def write(namespace: str, objects: Any, **options: Any) -> None:
        handed.extend(b for _, buffers in objects for b in buffers if isinstance(b, memoryview))
        original(namespace, objects, **options)

    pool.write = write  # type: ignore[method-assign]
    dcp.save({"w": tensor}, storage_writer=writer(pool))
    (buffer,) = handed
    tensor[0] = 5.0
    assert bytes(buffer) == bytes(bytes_of(tensor))


def test_large_states_are_spread_over_files(pool: CheckpointPool) -> None:
    tensors = {f"w{i}": torch.full((12 << 20,), i, dtype=torch.uint8) for i in range(8)}
    dcp.save(tensors, storage_writer=writer(pool))
    names = [object.key.rpartition("/")[2] for _, object, _, _ in pool.writes]
    assert sorted(names) == [f"__0_{n}.distcp" for n in range(len(names))]
    assert len(names) > 2
    loaded = blank(tensors)
    dcp.load(loaded, storage_reader=reader(pool))
    assert_same(loaded, tensors)


def test_the_metadata_that_save_returns_is_torchs(pool: CheckpointPool, tmp_path: Path) -> None:
    ours: Any = dcp.save(state(), storage_writer=writer(pool))
    theirs: Any = dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "s"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert {type(v) for v in ours.storage_data.values()} == {type(v) for v in theirs.storage_data.values()}
    assert ours.storage_meta.save_id == pool.only_save().save_id
    assert pickle.loads(pool.committed[(*KEY, "")][1]) == ours


def test_planner_data_without_a_json_form_is_kept_in_metadata(pool: CheckpointPool, tmp_path: Path) -> None:
    from collections import OrderedDict

    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = OrderedDict(metadata.planner_data)
            return plans, metadata

    dcp.save(state(), storage_writer=writer(pool), planner=Planner())
    assert isinstance(reader(pool).read_metadata().planner_data, OrderedDict)
    pool.upload(*KEY)
    pool.evict()
    assert isinstance(reader(pool).read_metadata().planner_data, OrderedDict)


def test_a_planner_may_store_what_it_likes(pool: CheckpointPool) -> None:
    class Halving(DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            made = super().transform_object(write_item, object)
            return made.half() if isinstance(made, torch.Tensor) else made

    dcp.save({"w": torch.arange(6.0)}, storage_writer=writer(pool), planner=Halving())
    loaded = {"w": torch.zeros(6)}
    dcp.load(loaded, storage_reader=reader(pool))
    assert_same(loaded, {"w": torch.arange(6.0)})


def test_a_torch_that_frames_in_another_way_frames_for_itself(
    pool: CheckpointPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchcache.checkpoint.staging.frame", lambda dtype, shape: None)
    dcp.save(state(), storage_writer=writer(pool))
    pool.upload(*KEY)
    for source in (reader(pool), dcp.FileSystemReader(folder_of(pool, tmp_path / "c"))):
        loaded = blank(state())
        dcp.load(loaded, storage_reader=source)
        assert_same(loaded, state())


# ---- one path, one checkpoint ----


def test_an_existing_checkpoint_is_not_overwritten(pool: CheckpointPool) -> None:
    dcp.save({"a": 1}, storage_writer=writer(pool))
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.save({"a": 2}, storage_writer=writer(pool))
    (failure, _) = raised.value.failures[0]
    assert isinstance(failure, AlreadyExists) and "pass overwrite=True or another path" in str(failure)
    dcp.save({"a": 3}, storage_writer=writer(pool, overwrite=True))
    loaded = {"a": None}
    dcp.load(loaded, storage_reader=reader(pool))
    assert loaded == {"a": 3}


def test_every_save_gets_an_id_and_a_path_of_its_own(pool: CheckpointPool) -> None:
    one = writer(pool)
    for step in (1, 2, 3):
        dcp.save({"step": step}, storage_writer=one, checkpoint_id=f"s3://bucket/run/step-{step}")
        assert one.checkpoint_id == f"s3://bucket/run/step-{step}"
    assert len({info.save_id for info in pool.saved.values()}) == 3
    for step in (1, 2, 3):
        loaded = {"step": None}
        dcp.load(loaded, storage_reader=reader(pool), checkpoint_id=f"s3://bucket/run/step-{step}")
        assert loaded == {"step": step}


def test_saves_from_several_threads_with_one_writer_do_not_mix(pool: CheckpointPool) -> None:
    one = writer(pool)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def save(step: int) -> None:
        class Slow(DefaultSavePlanner):
            def finish_plan(self, new_plan: SavePlan) -> SavePlan:
                barrier.wait(60)  # every thread has reset the writer and reserved its path by now
                return super().finish_plan(new_plan)

        try:
            dcp.save(
                {"step": step, "w": torch.full((9,), step)},
                storage_writer=one,
                planner=Slow(),
                checkpoint_id=f"s3://bucket/run/step-{step}",
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for step in range(4):
        loaded = {"step": None, "w": torch.zeros(9, dtype=torch.int64)}
        dcp.load(loaded, storage_reader=reader(pool, f"s3://bucket/run/step-{step}"))
        assert_same(loaded, {"step": step, "w": torch.full((9,), step)})


# ---- plan caching ----


@pytest.fixture
def no_cached_plans() -> Iterator[None]:
    caches = (
        "_cached_save_plan",
        "_cached_final_save_plan",
        "_cached_all_plans",
        "_cached_global_plan",
        "_cached_metadata",
    )
    for cache in caches:
        getattr(SavePlanner, cache).clear()
    yield
    for cache in caches:
        getattr(SavePlanner, cache).clear()


def test_a_cached_plan_saves_to_its_own_path(pool: CheckpointPool, no_cached_plans: None) -> None:
    one = writer(pool)
    for step in (1, 2, 3):
        tensors = {"w": torch.full((100,), step)}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(tensors, storage_writer=one, planner=planner, checkpoint_id=f"s3://bucket/run/{step}")
    for step in (1, 2, 3):
        loaded = {"w": torch.zeros(100, dtype=torch.int64)}
        dcp.load(loaded, storage_reader=reader(pool, f"s3://bucket/run/{step}"))
        assert_same(loaded, {"w": torch.full((100,), step)})


def test_another_rank_learns_the_id_although_its_plan_was_cached(pool: CheckpointPool) -> None:
    """What torch does on rank 1 when the plan that arrives is thrown away for a cached one."""
    coordinator, other = writer(pool), writer(pool)
    planner = DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(3)}, is_coordinator=False)
    items = planner.create_local_plan().items
    stale: SavePlan | None = None
    for step in (1, 2):
        for one, is_coordinator, rank in ((coordinator, True, 0), (other, False, 1)):
            one.reset(f"s3://bucket/run/{step}")
            one.set_up_storage_writer(is_coordinator, rank=rank, use_collectives=True)
        planned = coordinator.prepare_global_plan([SavePlan(items), SavePlan(items)])
        arrived = pickle.loads(pickle.dumps(planned[1]))
        stale = stale or arrived
        results = other.write_data(stale, planner).value()
        assert {result.storage_data.file for result in results} == {"__1_0.distcp"}
        ticket: Ticket = arrived.storage_data
        assert pool.writes[-1][1].version == f"save:{ticket.save_id}"
        assert pool.writes[-1][1].key == f"bucket/run/{step}/__1_0.distcp"
        end_lease_of_thread()
    assert len({write[1].version for write in pool.writes}) == 2


def test_without_a_plan_there_is_nothing_to_write_to(pool: CheckpointPool) -> None:
    one = writer(pool)
    one.set_up_storage_writer(False)
    with pytest.raises(CheckpointError, match="without a plan"):
        one.write_data(SavePlan([]), DefaultSavePlanner())


# ---- ranks without collectives ----


def test_without_collectives_each_rank_commits_its_part(pool: CheckpointPool, tmp_path: Path) -> None:
    for rank in (0, 1):
        one = writer(pool)
        planner = DefaultSavePlanner()
        planner.set_up_planner({f"w{rank}": torch.full((4,), rank)}, is_coordinator=rank == 0)
        one.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
        plans, metadata = planner.create_global_plan([one.prepare_local_plan(planner.create_local_plan())])
        (plan,) = one.prepare_global_plan(plans)
        results = one.write_data(planner.finish_plan(plan), planner).value()
        one.finish(metadata=metadata, results=[results])
        pool.upload(*KEY, f"__{rank}")
    assert sorted(p.name for p in folder_of(pool, tmp_path).iterdir()) == [
        "__0.metadata",
        "__0.torchcache.json",
        "__0_0.distcp",
        "__1.metadata",
        "__1.torchcache.json",
        "__1_0.distcp",
    ]
    stock: Any = dcp.FileSystemReader(tmp_path).read_metadata(rank=1)
    assert list(stock.state_dict_metadata) == ["w1"]


def test_a_rank_that_does_not_know_itself_cannot_save_without_collectives(pool: CheckpointPool) -> None:
    with pytest.raises(ConfigurationError, match="needs to know its rank"):
        writer(pool).set_up_storage_writer(True, use_collectives=False)


# ---- errors ----


def test_an_error_of_a_writing_thread_is_raised(pool: CheckpointPool) -> None:
    pool.write_error = OutOfSpace("the store is full")
    tensors = {f"w{i}": torch.zeros(40 << 20, dtype=torch.uint8) for i in range(6)}
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.save(tensors, storage_writer=writer(pool))
    assert isinstance(raised.value.failures[0][0], OutOfSpace)
    assert not pool.saved


def test_an_error_of_one_file_among_many_is_raised(pool: CheckpointPool) -> None:
    original = pool.write

    def write(namespace: str, objects: Any, **options: Any) -> None:
        if objects[0][0].key.endswith("__0_2.distcp"):
            raise ServerUnavailable("gone")
        original(namespace, objects, **options)

    pool.write = write  # type: ignore[method-assign]
    with pytest.raises(dcp.CheckpointException, match="gone"):
        dcp.save(
            {f"w{i}": torch.zeros(30 << 20, dtype=torch.uint8) for i in range(6)}, storage_writer=writer(pool)
        )
    assert not pool.saved


def test_an_error_of_the_planner_leaves_only_the_reservation(pool: CheckpointPool) -> None:
    class Broken(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            raise RuntimeError("out of CUDA memory")

    with pytest.raises(dcp.CheckpointException, match="out of CUDA memory"):
        dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool), planner=Broken())
    assert not pool.saved and not pool.save_files


@pytest.mark.parametrize(("item", "found"), [("a", "a BytesIO"), ("b", "a tensor")])
def test_a_planner_that_resolves_to_nonsense_is_named(pool: CheckpointPool, item: str, found: str) -> None:
    class Broken(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            return 3 if write_item.index.fqn == item else super().resolve_data(write_item)

    with pytest.raises(dcp.CheckpointException, match=f"resolved '{item}' to a int, not to {found}"):
        dcp.save({"a": 1, "b": torch.ones(2)}, storage_writer=writer(pool), planner=Broken())


# ---- the lease ----


def test_the_reservation_is_renewed_until_the_save_is_committed(pool: CheckpointPool) -> None:
    pool.lease_s = 0.15

    class Slow(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            until(lambda: pool.renewals >= 3)
            return super().resolve_data(write_item)

    dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool), planner=Slow())
    until(lambda: not renewing())
    assert pool.abandoned == []


def test_a_lost_reservation_is_raised_at_the_end(pool: CheckpointPool) -> None:
    pool.lease_s = 0.15
    pool.renew_error = AlreadyExists("host b pid 5 took the path over")

    class Slow(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            until(lambda: pool.renewals >= 1 and not renewing())
            return super().resolve_data(write_item)

    with pytest.raises(dcp.CheckpointException, match="took the path over"):
        dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool), planner=Slow())
    assert not pool.saved


def test_a_renewal_that_fails_in_passing_is_tried_again(pool: CheckpointPool) -> None:
    pool.lease_s = 0.15
    pool.renew_error = ServerUnavailable("restarting")

    class Slow(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            until(lambda: pool.renewals >= 3)
            return super().resolve_data(write_item)

    dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool), planner=Slow())
    assert pool.only_save().state == "committed"


class Failing(DefaultSavePlanner):
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        raise RuntimeError("no")


def test_the_next_save_of_a_thread_gives_back_what_the_last_left(pool: CheckpointPool) -> None:
    one = writer(pool)
    with pytest.raises(dcp.CheckpointException):
        dcp.save({"a": torch.ones(2)}, storage_writer=one, planner=Failing())
    assert pool.reserved
    dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool))
    assert len(pool.abandoned) == 1
    assert pool.only_save().save_id not in pool.abandoned


def test_reset_gives_back_what_the_last_save_left(pool: CheckpointPool) -> None:
    one = writer(pool)
    with pytest.raises(dcp.CheckpointException):
        dcp.save({"a": torch.ones(2)}, storage_writer=one, planner=Failing())
    one.reset("s3://bucket/other")
    assert not pool.reserved


def test_a_writer_that_is_dropped_gives_back_what_its_save_left(pool: CheckpointPool) -> None:
    try:
        dcp.save({"a": torch.ones(2)}, storage_writer=writer(pool), planner=Failing())
    except dcp.CheckpointException:
        pass
    assert until_collected(lambda: not pool.reserved)


def test_what_a_dropped_writer_left_is_given_back_before_its_thread_saves_again(pool: CheckpointPool) -> None:
    with pytest.raises(dcp.CheckpointException):
        dcp.save({"a": torch.ones(2)}, storage_writer=(one := writer(pool)), planner=Failing())
    one._local.save.release()  # as when nothing refers to it any more: the thread of the lease is told, and may be late
    end_lease_of_thread()
    assert not pool.reserved


def test_a_thread_that_ended_gives_back_what_its_save_left(pool: CheckpointPool) -> None:
    pool.lease_s = 0.15
    one = writer(pool)  # outlives the thread

    def save() -> None:
        with pytest.raises(dcp.CheckpointException):
            dcp.save({"a": torch.ones(2)}, storage_writer=one, planner=Failing())

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    until(lambda: not pool.reserved)


# ---- durability ----


def test_a_save_waits_for_the_store_if_asked(pool: CheckpointPool) -> None:
    def upload() -> None:
        until(lambda: bool(pool.saved))
        pool.upload(*KEY)

    uploader = threading.Thread(target=upload)
    uploader.start()
    dcp.save(state(), storage_writer=writer(pool, durability="store"))
    assert pool.only_save().state == "durable"
    uploader.join()


def test_a_failed_upload_says_so(pool: CheckpointPool) -> None:
    def fail() -> None:
        until(lambda: bool(pool.saved))
        pool.upload(*KEY, state="failed")

    uploader = threading.Thread(target=fail)
    uploader.start()
    with pytest.raises(dcp.CheckpointException, match="was saved to the pool, but its upload failed"):
        dcp.save(state(), storage_writer=writer(pool, durability="store"))
    uploader.join()


def test_an_upload_that_stands_still_is_not_waited_for_forever(
    pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchcache.checkpoint.durable.STALL_S", 0.1)
    pool.uploads = False
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.save(state(), storage_writer=writer(pool, durability="store"))
    assert isinstance(raised.value.failures[0][0], DeadlineExceeded)


# ---- what torch wants to know ----


def test_a_writer_pickles_and_counts_as_present(pool: CheckpointPool) -> None:
    one = writer(pool, overwrite=True, durability="store")
    dcp.save({"a": 1}, storage_writer=writer(pool))
    again = pickle.loads(pickle.dumps(one))
    assert bool(one) and bool(again)
    assert (again.path, again.overwrite, again.durability) == (URI, True, "store")
    assert again._pool is None
    assert repr(again) == f"CacheStorageWriter('{URI}', durability='store')"


def test_items_and_tickets_pickle_between_versions(pool: CheckpointPool) -> None:
    ticket = Ticket("s3://b/x", "s3", "b/x", "", "id", 2, ("server",))
    make, values = ticket.__reduce__()
    assert callable(make) and isinstance(values, tuple)
    assert make(*values, "what a newer version adds") == ticket
    assert make(*values[:6]) == replace(ticket, servers=())
    forget_arrived()
    dcp.save(state(), storage_writer=writer(pool))
    for item in Manifest.decode(pool.only_save().manifest, where="x").items:
        of_old = Item.__new__(Item)
        of_old.__setstate__(item.__getstate__()[:-1])  # type: ignore[attr-defined]
        assert (of_old, of_old.probe) == (item, 0)


def test_items_and_tickets_pickle(pool: CheckpointPool) -> None:
    ticket = Ticket("s3://b/x", "s3", "b/x", "", "id", 2)
    assert pickle.loads(pickle.dumps(ticket)) == ticket
    dcp.save(state(), storage_writer=writer(pool))
    items = Manifest.decode(pool.only_save().manifest, where="x").items
    assert pickle.loads(pickle.dumps(items)) == items
    assert json.loads(pool.only_save().manifest)["body"]["torch"] == torch.__version__
