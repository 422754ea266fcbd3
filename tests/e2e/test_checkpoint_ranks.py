"""Checkpoints by two ranks over gloo, through a real pool to a real S3: sharded, resharded, cached plans, failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e import checkpoint_ranks as ranks
from torchcache.checkpoint.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


Run = Callable[[Callable[[Any, str], None], str], None]


@pytest.fixture(scope="module")
def pool(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    root = tmp_path_factory.mktemp("pool")
    with environment(s3_server.environment()), tc.LocalPool(root, capacity="1GB") as pool:
        yield pool


@pytest.fixture(scope="module")
def world(pool: tc.Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ranks.Ranks]:
    with ranks.Ranks(tmp_path_factory.mktemp("ranks")) as world:
        yield world


@pytest.fixture
def run(pool: tc.Pool, world: ranks.Ranks) -> Run:
    """Runs a scenario on two ranks."""
    return lambda scenario, uri: world.run(scenario, pool, uri)


@pytest.fixture
def bucket(s3_server: SeaweedFS) -> str:
    return f"s3://{s3_server.make_bucket()}"


def one_process_state() -> dict[str, Any]:
    return {"model": ranks.whole(), "step": 5, "settings": {"lr": 0.1, "names": ["a", "b"]}}


def manifest_of(pool: tc.Pool, uri: str) -> Manifest:
    return Manifest.decode(pool.get_save(*pool.resolve(uri)).manifest, where=uri)


def test_by_the_name_of_the_under_store_ours_and_stock_load_each_other(bucket: str, run: Run) -> None:
    run(ranks.ours_and_stock_by_name, bucket)


def test_each_rank_borrows_what_it_wrote(pool: tc.Pool, bucket: str, run: Run) -> None:
    run(ranks.save_again, f"{bucket}/again")
    for step in (1, 2):
        uri = f"{bucket}/again/step-{step}"
        info = pool.get_save(*pool.resolve(uri))
        assert {name: path.rpartition("/")[2] for name, (path, _) in info.borrowed.items()} == {
            "__0_0.distcp": "step-0",
            "__1_0.distcp": "step-0",
        }
        own = [size for name, size in manifest_of(pool, uri).files.items() if name not in info.borrowed]
        assert sum(own) < 0.1 * info.total_bytes


def test_where_one_rank_finds_no_room_all_begin_anew(pool: tc.Pool, bucket: str, run: Run) -> None:
    """F11: a run's next save borrows again."""
    run(ranks.save_where_one_rank_finds_no_room, f"{bucket}/run")
    borrowed = [pool.get_save(*pool.resolve(f"{bucket}/run/step-{step}")).borrowed for step in range(3)]
    assert [bool(one) for one in borrowed] == [False, False, True]


def test_resharding_from_two_ranks_to_one_to_two(pool: tc.Pool, bucket: str, run: Run) -> None:
    run(ranks.save_and_reshard, f"{bucket}/two")
    manifest = manifest_of(pool, f"{bucket}/two")
    # What both ranks hold is stored once; what is sharded, once in all.
    stored = sum(item.payload_length for item in manifest.items if item.kind == "tensor")
    assert stored == sum(tensor.nbytes for tensor in ranks.whole().values())
    assert {item.file for item in manifest.items} == {"__0_0.distcp", "__1_0.distcp"}

    state = ranks.emptied(one_process_state())
    dcp.load(state, storage_reader=tc.CacheStorageReader(f"{bucket}/two", pool=pool))
    ranks.assert_loaded(state)

    dcp.save(state, storage_writer=tc.CacheStorageWriter(f"{bucket}/one", pool=pool))
    run(ranks.load_sharded, f"{bucket}/one")


def test_what_ranks_of_a_node_read_alike_is_fetched_once(
    pool: tc.Pool, world: ranks.Ranks, bucket: str, tmp_path: Path, no_hedges: None
) -> None:
    """By whichever of two servers owns it: neither the other nor the second rank fetches it again."""
    state = {"a": torch.arange(float(ranks.LARGE)), "b": torch.ones(ranks.LARGE)}
    sizes = 0
    with tc.LocalPool(tmp_path / "two", "300MB", servers=2) as two:
        for number in range(20):
            uri = f"{bucket}/replicated-{number}"
            writer = tc.CacheStorageWriter(uri, pool=pool, durability="store")
            dcp.save(state, storage_writer=writer, no_dist=True)
            sizes += sum(manifest_of(pool, uri).files.values())
            for _ in range(2):  # the second time nothing is fetched
                world.run(ranks.load_replicated, two, uri)
                filled = [status.filled_bytes for status in two.status()]
                assert sizes <= sum(filled) <= sizes + (number + 1) * 64 * 1024  # manifests besides
            if all(filled):  # each of the two owned some of it
                return
    raise AssertionError("one server owns all of twenty checkpoints")


def test_stock_reader_loads_what_two_ranks_saved(pool: tc.Pool, tmp_path: Path, run: Run) -> None:
    run(ranks.save_from_a_thread, str(tmp_path / "ckpt"))
    writer = tc.CacheStorageWriter(tmp_path / "ckpt", pool=pool)
    store, path = pool.resolve(str(writer.checkpoint_id))
    deadline = time.monotonic() + 120
    while pool.get_save(store, path).state != "durable":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    state = ranks.emptied(one_process_state())
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "ckpt"))
    # It was zeroed after async_save had staged it: what was saved is the old one.
    assert torch.equal(state["model"]["plain"], ranks.whole()["plain"])
    ranks.assert_loaded(state)


def test_cached_plans_go_to_the_right_save(bucket: str, run: Run) -> None:
    run(ranks.save_with_cached_plans, f"{bucket}/run")


def test_a_rank_that_fails_fails_the_save_and_the_next_one_succeeds_f32(bucket: str, run: Run) -> None:
    run(ranks.fail_then_save, f"{bucket}/run")


def test_ranks_save_and_load_without_collectives(pool: tc.Pool, bucket: str, run: Run) -> None:
    run(ranks.save_without_collectives, f"{bucket}/run")
    store, path = pool.resolve(f"{bucket}/run")
    assert {pool.get_save(store, path, part).part for part in ("__0", "__1")} == {"__0", "__1"}
    with pytest.raises(tc.NotCommitted):
        pool.get_save(store, path)


def test_async_saves_from_another_process(bucket: str, run: Run) -> None:
    run(ranks.save_from_a_process, f"{bucket}/run")


def test_saves_that_overlap_go_one_behind_the_other(bucket: str, run: Run) -> None:
    run(ranks.save_one_behind_the_other, f"{bucket}/run")


def test_the_manager_on_two_ranks(pool: tc.Pool, bucket: str, run: Run) -> None:
    run(ranks.manage, f"{bucket}/run")
    # Another number of ranks has no use for the positions of two, and is told; all else it loads.
    with tc.CheckpointManager(f"{bucket}/run", pool=pool) as manager:
        state = ranks.emptied(one_process_state())
        assert manager.load(state) == 2
        ranks.assert_loaded(state)
        with pytest.raises(tc.CheckpointError, match="no position for 'loader' on rank 0 of 1"):
            manager.load({"loader": ranks.StatefulDataLoader(ranks.Numbers())})


def test_what_one_rank_meets_all_raise(bucket: str, run: Run) -> None:
    run(ranks.manager_errors_are_everybody_s, f"{bucket}/run")


def test_the_stager_and_torch_s_process(bucket: str, run: Run) -> None:
    run(ranks.stage_for_a_process, f"{bucket}/run")
