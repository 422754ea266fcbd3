"""CheckpointManager through a real pool to a real S3: what is saved comes back exactly, what may go goes."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e.throwaway import throwaway
from tests.unit.checkpoint_states import assert_same, blank, state
from tests.unit.test_checkpoint_extensions import Bzip2
from tests.unit.test_checkpoint_extensions import registry as extension_registry
from tests.waiting import until
from torchcache.checkpoint.hold import Hold
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.resume import Record
from torchcache.checkpoint.stager import default_stager
from torchcache.checkpoint.stager_memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def shared(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    root = tmp_path_factory.mktemp("pool")
    with environment(s3_server.environment()), throwaway(tc.LocalPool(root, "1GB"), root) as pool:
        yield pool


@pytest.fixture
def pool(shared: tc.Pool, s3: SeaweedFS) -> tc.Pool:
    return shared


@pytest.fixture(scope="module")
def other_pool(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    """A pool that has no copies of what the first one saved."""
    root = tmp_path_factory.mktemp("other")
    with environment(s3_server.environment()), throwaway(tc.LocalPool(root, "1GB"), root) as pool:
        yield pool


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    return s3.make_bucket()


@pytest.fixture
def root(bucket: str) -> str:
    return f"s3://{bucket}/run"


def keys(s3: SeaweedFS, bucket: str) -> list[str]:
    return [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def states(manager: tc.CheckpointManager) -> dict[int, str]:
    return {step.step: step.state for step in manager.list()}


# ---- saving and loading ----


def test_stream_extensions_both_ways(pool: tc.Pool, root: str) -> None:
    """All goes through them, the random state and the loader's position too."""
    extended = tc.CheckpointManager(
        root, pool=pool, _extensions=[Bzip2()], _extension_registry=extension_registry()
    )
    random.seed(3)
    extended.save(1, state())
    extended.save_async(2, state()).result(120)
    expected = random.random()
    for step in (1, 2):
        info = pool.get_save(*pool.resolve(f"{root}/step-{step}"))
        items = Manifest.decode(info.manifest, where=root).items
        assert {item.transforms for item in items} == {("stream.bzip2/1",)}
        loaded = blank(state())
        random.seed(0)
        assert extended.load(loaded, step) == step
        assert_same(loaded, state())
        assert random.random() == expected
    plain = tc.CheckpointManager(root, pool=pool)
    with pytest.raises(tc.CheckpointError, match=r"stream\.bzip2/1"):
        plain.load(blank(state()), 1)


@pytest.mark.parametrize(
    "wrong", [{"_extensions": [object()]}, {"durability": "disk"}, {"replicas": 0}, {"extra_memory_bytes": 0}]
)
def test_wrong_settings_are_refused_before_the_first_save(pool: tc.Pool, root: str, wrong: Any) -> None:
    with pytest.raises(tc.ConfigurationError, match=next(iter(wrong))):
        tc.CheckpointManager(root, pool=pool, **wrong)


def test_all_kinds_of_values_come_back(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    assert manager.latest() is None
    assert manager.list() == []
    with pytest.raises(tc.NotCommitted, match="no checkpoint under"):
        manager.load(blank(state()))
    manager.save(7, state())
    loaded = blank(state())
    assert manager.load(loaded) == 7
    assert_same(loaded, state())
    assert manager.latest() == 7
    only = {"step": None}  # less may be asked for
    assert manager.load(only) == 7
    assert only == {"step": 12}


def test_what_the_state_had_no_place_for_is_loaded_too(pool: tc.Pool, root: str) -> None:
    saved = {"history": {"loss": [1.0, 2.0], "best": {"at": 3, "weights": torch.ones(3)}}, "other": 1}
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, saved)
    for history in ({}, {"best": {"weights": None}}, {"loss": None}):
        loaded: dict[str, Any] = {"history": history}
        manager.load(loaded)
        assert_same(loaded, {"history": saved["history"]})


def test_it_is_a_stock_checkpoint(
    pool: tc.Pool, root: str, s3: SeaweedFS, bucket: str, tmp_path: Path
) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(0, state())
    manager.wait_durable()
    for key in ("run/step-0/.metadata", "run/step-0/__0_0.distcp"):
        s3.client.download_file(bucket, key, str(tmp_path / key.rpartition("/")[2]))
    loaded = blank(state())
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert_same(loaded, state())


class Squares(Dataset[torch.Tensor]):
    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index * index) / 1000)


class Training:
    """A model with dropout, Adam, a schedule, a loader, and random numbers of all three kinds."""

    def __init__(self, pool: tc.Pool, seed: int, workers: int = 0, length: int = 40) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3)
        self.loader = StatefulDataLoader(
            tc.CachedDataset(Squares(length), name="squares", version=length, pool=pool),
            batch_size=4,
            shuffle=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(seed),
        )
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "loader": self.loader,
            "epoch": 0,
        }

    def run(self, steps: int, after: Callable[[int], None] = lambda step: None) -> list[float]:
        seen: list[float] = []
        while len(seen) < steps:
            for batch in self.loader:
                loss = (self.model(batch) - random.random() - float(np.random.rand())).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                seen.append(loss.item() + batch.sum().item())
                after(len(seen))
                if len(seen) == steps:
                    return seen
            self.state["epoch"] += 1
        return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_as_if_it_had_never_stopped(pool: tc.Pool, root: str, workers: int) -> None:
    """In the middle of the second epoch; every loss afterwards is the same to the last bit."""
    manager = tc.CheckpointManager(root, pool=pool)
    first = Training(pool, seed=1, workers=workers)

    def save(step: int) -> None:
        if step == 14:
            manager.save(step, first.state)

    expected = first.run(27, save)
    other = Training(pool, seed=2, workers=workers)
    assert manager.load(other.state) == 14
    assert other.state["epoch"] == 1
    assert other.run(13) == expected[14:]
    assert_same(other.model.state_dict(), first.model.state_dict())
    ours, theirs = other.optimizer.state_dict(), first.optimizer.state_dict()
    assert_same(
        {str(k): v for k, v in ours["state"].items()}, {str(k): v for k, v in theirs["state"].items()}
    )
    assert ours["param_groups"] == theirs["param_groups"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [StatefulDistributedSampler, tc.LocalitySampler])
def test_the_rest_of_a_later_epoch_is_that_epochs(pool: tc.Pool, root: str, workers: int, kind: Any) -> None:
    """The sampler is told its epoch behind `load`, from which it is known; workers are asked for batches before."""

    def loader() -> Any:
        dataset = tc.CachedDataset(Squares(), name="squares", version=40, pool=pool)
        sampler = kind(dataset, num_replicas=1, rank=0, seed=1)
        return StatefulDataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers)

    manager = tc.CheckpointManager(root, pool=pool)
    first = loader()
    first.sampler.set_epoch(1)
    expected = []
    for number, batch in enumerate(first):
        expected.append(batch[:, 0].tolist())
        if number == 4:
            manager.save(5, {"loader": first, "epoch": 1})
    other = loader()
    state = {"loader": other, "epoch": 0}
    manager.load(state)
    other.sampler.set_epoch(state["epoch"])
    assert [batch[:, 0].tolist() for batch in other] == expected[5:]


def test_random_numbers_can_be_left_out(pool: tc.Pool, root: str) -> None:
    tc.CheckpointManager(root, pool=pool).save(1, {"a": 1})
    before = torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    tc.CheckpointManager(root, pool=pool, rng=False).load({"a": 0})
    assert torch.equal(torch.get_rng_state(), moved)
    tc.CheckpointManager(root, pool=pool).load({"a": 0})
    assert torch.equal(torch.get_rng_state(), before)
    tc.CheckpointManager(root, pool=pool, rng=False).save(2, {"a": 1})
    torch.rand(1)
    moved = torch.get_rng_state()
    assert tc.CheckpointManager(root, pool=pool).load({"a": 0}) == 2
    assert torch.equal(torch.get_rng_state(), moved)


def test_a_dataset_that_changed_is_named_before_anything_is_touched(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    first = Training(pool, seed=1)
    first.run(2)
    manager.save(2, first.state)
    other = Training(pool, seed=2, length=44)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(tc.CheckpointError, match=r"dataset of 'loader' has changed .*version"):
        manager.load(other.state)
    assert_same(other.model.state_dict(), before)
    del other.state["loader"]
    assert manager.load(other.state) == 2


class StrangeData(Squares):
    def state_dict(self) -> dict[str, Any]:
        return {"at": Squares()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never")


def test_a_position_that_could_not_be_read_back_is_refused_when_it_is_saved(pool: tc.Pool, root: str) -> None:
    loader = StatefulDataLoader(StrangeData(), batch_size=4, num_workers=0)
    next(iter(loader))
    manager = tc.CheckpointManager(root, pool=pool)
    with pytest.raises(
        tc.CheckpointError, match="state of 'loader' holds something that can't be loaded safely"
    ):
        manager.save(1, {"loader": loader})
    assert manager.list() == []


def test_a_checkpoint_without_a_position_is_not_taken_for_one_with(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"a": 1})
    with pytest.raises(tc.CheckpointError, match="no position for 'loader' on rank 0 of 1"):
        manager.load({"a": 0, "loader": Training(pool, seed=1).loader})


def test_what_would_be_loaded_wrong_is_refused(pool: tc.Pool, root: str) -> None:
    """torch's copy into a tensor that is detached says nothing, and changes nothing."""
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"a": torch.eye(3).to_sparse()})
    with pytest.raises(tc.CheckpointError, match="'a' can't be loaded into a sparse tensor"):
        manager.load({"a": torch.zeros(3, 3).to_sparse()})


def test_errors_are_ours(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"a": 1})
    with pytest.raises(tc.AlreadyExists, match="pass overwrite=True"):
        manager.save(1, {"a": 2})
    manager.save(1, {"a": 3}, overwrite=True)
    loaded = {"a": 0}
    manager.load(loaded)
    assert loaded == {"a": 3}
    with pytest.raises(tc.CheckpointError, match="Missing key in checkpoint"):
        manager.load({"b": 0})
    with pytest.raises(tc.NotCommitted):
        manager.load({"a": 0}, step=2)
    with pytest.raises(tc.NotCommitted):
        manager.delete(2)
    with pytest.raises(tc.NotCommitted):
        manager.wait_durable(2)
    for wrong in (-1, 1.0, "1", True, None):
        with pytest.raises(tc.ConfigurationError, match="a step is a number"):
            manager.save(wrong, {})  # type: ignore[arg-type]
    for options in ({"keep_last": 0}, {"keep_every": -1}, {"keep_last": 1.5}):
        with pytest.raises(tc.ConfigurationError):
            tc.CheckpointManager(root, pool=pool, **options)  # type: ignore[arg-type]
    with pytest.raises(tc.ConfigurationError, match="can't name an entry"):
        manager.save(9, {"_torchcache.rank-0": 1})


# ---- what stays ----


def test_retention_keeps_what_it_should_and_leaves_nothing_of_the_rest(
    pool: tc.Pool, root: str, s3: SeaweedFS, bucket: str
) -> None:
    manager = tc.CheckpointManager(root, keep_last=2, keep_every=4, pool=pool)
    s3.client.put_object(Bucket=bucket, Key="run/notes/step-1", Body=b"mine")
    for step in range(1, 8):
        manager.save(step, {"a": torch.full((1000,), step)})
        manager.wait_durable(step)
    assert states(manager) == {4: "durable", 6: "durable", 7: "durable"}
    left = {key.split("/")[1] for key in keys(s3, bucket)}
    assert left == {"step-4", "step-6", "step-7", "notes"}
    saves = [n.name for n in pool.status()[0].namespaces if n.name.startswith(f"save:s3/{bucket}/")]
    assert {name.partition("@")[0].rpartition("/")[2] for name in saves} == {"step-4", "step-6", "step-7"}
    loaded = {"a": torch.zeros(1000, dtype=torch.int64)}
    assert manager.load(loaded, 4) == 4
    assert loaded["a"].eq(4).all()


def test_a_run_that_went_back_keeps_what_it_saves(
    pool: tc.Pool, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"w": torch.arange(4)}
    with tc.CheckpointManager(root, keep_last=2, pool=pool) as manager:
        for step in (100, 200, 300):
            manager.save(step, state)
        manager.wait_durable()
    with tc.CheckpointManager(root, keep_last=1, pool=pool) as manager:
        assert manager.load(state, step=200) == 200
        for step in (210, 220):
            manager.save(step, state)
            assert step in [s.step for s in manager.list()]
        manager.wait_durable()
        assert [s.step for s in manager.list()] == [220, 300]
    warnings = [r.getMessage() for r in caplog.records if "goes on to step 300" in r.getMessage()]
    assert len(warnings) == 1
    assert "step 210 was saved" in warnings[0]


def test_one_that_is_being_read_stays_until_it_is_not(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, keep_last=1, pool=pool)
    manager.save(1, {"a": 1})
    manager.wait_durable()
    hold = Hold(pool, pool.get_save(*pool.resolve(f"{root}/step-1")))
    hold.take()
    with hold.kept():
        manager.save(2, {"a": 2})
        manager.wait_durable()
        assert list(states(manager)) == [1, 2]
        with pytest.raises(tc.InUse, match="is being read by"):
            manager.delete(1)
        assert manager.load({"a": 0}, 1) == 1
    manager.save(3, {"a": 3})
    manager.wait_durable()
    assert list(states(manager)) == [3]


def test_one_is_read_from_its_first_byte_to_its_last(pool: tc.Pool, root: str) -> None:
    """torch opens it once for this rank's own part and once for the rest: it must not go in between."""

    class Between:
        def state_dict(self) -> dict[str, Any]:
            with pytest.raises(tc.InUse):
                manager.delete(1)
            asked.append(1)
            return {"a": torch.zeros(10)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert state["a"].eq(1).all()
            asked.append(2)

    asked: list[int] = []
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"it": {"a": torch.ones(10)}})
    assert manager.load({"it": Between()}) == 1
    assert asked == [1, 2]
    manager.delete(1)


def test_those_that_were_listed_have_gone_when_they_are_loaded(
    pool: tc.Pool, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"a": 1})
    whole = type(manager)._restorable

    def meanwhile(self: tc.CheckpointManager) -> list[int]:
        found = whole(self)
        monkeypatch.undo()
        other = tc.CheckpointManager(root, keep_last=1, pool=pool)
        other.save(2, {"a": 2})
        other.wait_durable()
        assert list(states(other)) == [2]
        return found

    monkeypatch.setattr(tc.CheckpointManager, "_restorable", meanwhile)
    state = {"a": 0}
    assert manager.load(state) == 2
    assert state == {"a": 2}


def test_the_last_durable_one_outlives_those_that_are_not(pool: tc.Pool, tmp_path: Path) -> None:
    """Two uploads are hindered, by folders in the way of their files."""
    manager = tc.CheckpointManager(tmp_path / "run", keep_last=1, pool=pool)
    manager.save(1, {"a": 1})
    manager.wait_durable()
    for step in (2, 3):
        (tmp_path / f"run/step-{step}/__0_0.distcp/in the way").mkdir(parents=True)
        manager.save(step, {"a": step})
    assert list(states(manager)) == [1, 3]
    assert states(manager)[1] == "durable"
    assert manager.load({"a": 0}) == 3  # from the pool
    (tmp_path / "run/step-3/__0_0.distcp/in the way").rmdir()
    (tmp_path / "run/step-3/__0_0.distcp").rmdir()
    until(lambda: states(manager)[3] == "durable")
    manager.wait_durable(3)
    assert states(manager) == {3: "durable"}


def test_deleting(pool: tc.Pool, root: str, s3: SeaweedFS, bucket: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    for step in (1, 2):
        manager.save(step, {"a": step})
    manager.delete(2)  # uploaded or not
    assert manager.latest() == 1
    manager.wait_durable()
    manager.delete(1)
    assert manager.latest() is None
    assert keys(s3, bucket) == []
    manager.save(1, {"a": 5})
    assert manager.latest() == 1


def test_broken_ones_are_passed_over_and_it_is_said_why(
    pool: tc.Pool,
    other_pool: tc.Pool,
    root: str,
    s3: SeaweedFS,
    bucket: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager = tc.CheckpointManager(root, keep_last=None, pool=pool)
    for step in range(1, 6):
        manager.save(step, {"a": torch.full((100_000,), step)})
    manager.wait_durable()
    s3.client.delete_object(Bucket=bucket, Key="run/step-5/__0_0.distcp")
    s3.client.put_object(Bucket=bucket, Key="run/step-4/.torchcache.json", Body=b"{")
    s3.client.put_object(Bucket=bucket, Key="run/step-3/__0_0.distcp", Body=b"short")
    s3.client.delete_object(Bucket=bucket, Key="run/step-2/.torchcache.json")  # stock still
    s3.client.put_object(Bucket=bucket, Key="run/step-9/.torchcache.save.json", Body=b"{}")
    caplog.set_level(logging.WARNING, "torchcache")
    elsewhere = tc.CheckpointManager(root, pool=other_pool)
    assert elsewhere.latest() == 2
    reasons = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert [reason.partition(" ")[2].partition(" ")[0] for reason in reasons] == ["9", "5", "4", "3"]
    assert "never finished" in reasons[0]
    assert "__0_0.distcp can't be found whole" in reasons[1]
    assert "manifest" in reasons[2]
    loaded = {"a": torch.zeros(100_000, dtype=torch.int64)}
    assert elsewhere.load(loaded) == 2
    assert loaded["a"].eq(2).all()
    with pytest.raises(tc.IntegrityError, match="step-5 is broken"):
        elsewhere.load(loaded, 5)


def test_one_that_turns_out_damaged_while_it_is_loaded_is_passed_over(
    pool: tc.Pool, other_pool: tc.Pool, root: str, s3: SeaweedFS, bucket: str
) -> None:
    """F34."""
    manager = tc.CheckpointManager(root, keep_last=None, pool=pool)
    for step in (1, 2):
        manager.save(step, {"a": torch.full((100_000,), step)})
    manager.wait_durable()
    whole = s3.client.get_object(Bucket=bucket, Key="run/step-2/__0_0.distcp")["Body"].read()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    s3.client.put_object(Bucket=bucket, Key="run/step-2/__0_0.distcp", Body=bytes(damaged))
    loaded = {"a": torch.zeros(100_000, dtype=torch.int64)}
    elsewhere = tc.CheckpointManager(root, pool=other_pool)
    assert elsewhere.load(loaded) == 1
    assert loaded["a"].eq(1).all()
    with pytest.raises(tc.IntegrityError):
        elsewhere.load(loaded, 2)


def test_a_checkpoint_that_goes_while_others_load_the_next(pool: tc.Pool, root: str) -> None:
    """Evaluation loads the latest over and over while training saves and deletes: it always gets one, whole."""
    manager = tc.CheckpointManager(root, keep_last=1, pool=pool)
    manager.save(0, {"a": torch.full((50_000,), 0)})
    done = threading.Event()
    seen: list[int] = []
    problems: list[BaseException] = []

    def evaluate() -> None:
        watcher = tc.CheckpointManager(root, pool=pool, rng=False)
        while not done.is_set() or not seen:
            loaded = {"a": torch.full((50_000,), -1)}
            try:
                step = watcher.load(loaded)
                assert loaded["a"].eq(step).all()
                seen.append(step)
            except BaseException as error:
                problems.append(error)
                return

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for step in range(1, 12):
            manager.save(step, {"a": torch.full((50_000,), step)})
    finally:
        done.set()
        thread.join()
    assert not problems, problems
    assert seen == sorted(seen)


# ---- asynchronous ----


def test_training_may_change_the_state_as_soon_as_the_call_returns(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, keep_last=None, pool=pool)
    weights = torch.zeros(500_000)
    futures = []
    for step in range(5):
        weights.fill_(step)
        futures.append(manager.save_async(step, {"w": weights, "step": step}))
        weights.fill_(-1)
    assert futures[-1].result(300) is None
    assert all(future.done() for future in futures)  # one at a time
    for step in range(5):
        loaded = {"w": torch.empty(500_000), "step": None}
        manager.load(loaded, step)
        assert loaded["w"].eq(step).all()
        assert loaded["step"] == step
    manager.close()


def test_an_error_of_a_save_behind_is_not_lost(pool: tc.Pool, root: str) -> None:
    manager = tc.CheckpointManager(root, pool=pool)
    manager.save(1, {"a": 1})
    future = manager.save_async(1, {"a": 2})
    with pytest.raises(tc.AlreadyExists):
        future.result(300)
    manager.save(2, {"a": 2})  # it was heard
    manager.save_async(1, {"a": 3})
    with pytest.raises(tc.AlreadyExists):
        manager.latest()
    assert manager.latest() == 2
    manager.save_async(1, {"a": 3})
    with pytest.raises(tc.AlreadyExists):
        manager.close()


def test_async_save_of_torch_stages_in_memory_that_all_writers_share(pool: tc.Pool, root: str) -> None:
    default_stager().close()
    weights = torch.zeros(500_000)
    futures: list[Any] = []
    addresses = set()
    for step in range(4):
        weights.fill_(step)
        future: Any = dcp.async_save(
            {"w": weights}, storage_writer=tc.CacheStorageWriter(f"{root}/{step}", pool=pool), no_dist=True
        )
        futures.append(future)
        weights.fill_(-1)
        if step == 2:  # one that fails holds nothing up, though its error is kept
            future.result(300)
            failed: Any = dcp.async_save(
                {"w": weights},
                storage_writer=tc.CacheStorageWriter(f"{root}/{step}", pool=pool),
                no_dist=True,
            )
            with pytest.raises(dcp.CheckpointException):
                failed.result(300)
        memory = default_stager()._memory
        assert isinstance(memory, Memory)
        addresses.add(memory._whole.data_ptr())
    for future in futures:
        future.result(300)
    assert len(addresses) == 1
    for step in range(4):
        loaded = {"w": torch.empty(500_000)}
        dcp.load(loaded, storage_reader=tc.CacheStorageReader(f"{root}/{step}", pool=pool), no_dist=True)
        assert loaded["w"].eq(step).all()


def test_a_loaders_state_in_an_entry_of_its_own_moves_to_other_ranks(
    pool: tc.Pool, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/checkpoints.md has it for LocalitySampler; the loader itself is refused there."""
    for name in range(24):
        (tmp_path / f"{name:02}").write_bytes(bytes([name]))
    files = tc.CachedDataset.from_files(f"file://{tmp_path}", pool=pool)

    def loader(world: int, rank: int) -> StatefulDataLoader:
        return StatefulDataLoader(
            files, 2, sampler=tc.LocalitySampler(files, world, rank, batch_size=2, seed=3)
        )

    had: list[bytes] = []
    for rank in range(3):
        saved = loader(3, rank)
        reading = iter(saved)
        had += [one for _ in range(2) for one in next(reading)]
    with tc.CheckpointManager(root, pool=pool) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(
                "torchcache.checkpoint.manager.Record", lambda **given: Record(**given | {"world_size": 3})
            )
            manager.save(1, {"loader": saved, "place": saved.state_dict()})
        with pytest.raises(tc.errors.CheckpointError, match="no position for 'loader'"):
            manager.load({"loader": loader(2, 0), "place": {}})
        state: dict[str, Any] = {"place": {}}
        manager.load(state)
    for rank in range(2):
        sampler = tc.LocalitySampler(files, 2, rank, batch_size=2, seed=3)
        sampler.load_state_dict(state["place"])
        had += [one for batch in StatefulDataLoader(files, 2, sampler=sampler) for one in batch]
    assert sorted(had) == [bytes([name]) for name in range(24)]
