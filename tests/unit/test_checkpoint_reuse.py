"""Saves of which a part is what it was: what is sent, what is taken over, and that all of it is loaded right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import checkpoint_states as states
from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import assert_same, blank, folder_of
from torchcache.checkpoint import layout, reuse, takeover, writer
from torchcache.checkpoint.layout import GRANULE_BYTES
from torchcache.checkpoint.lease import end_lease_of_thread
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.reuse import LEAST_TAKEN, MOST_STALE, KeptItem, Memory, files_to_keep
from torchcache.checkpoint.unchanged import is_unchanged
from torchcache.errors import CheckpointError, OutOfSpace
from torchcache.pool import SaveInfo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RUN = "s3://bucket/run"
LAYER_BYTES = 64 * 1024
LAYERS = 20


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MEMORY", Memory())


@pytest.fixture
def pool() -> Iterator[CheckpointPool]:
    yield CheckpointPool()
    end_lease_of_thread()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four layers."""
    monkeypatch.setattr(layout, "_LEAST_FILE_BYTES", 4 * LAYER_BYTES)
    monkeypatch.setattr(writer, "_WRITERS", 100)


def layers(count: int = LAYERS) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(1)
    return {f"layer.{n:02d}": torch.randn(LAYER_BYTES // 4, generator=chance) for n in range(count)}


def save(pool: CheckpointPool, step: int, state: dict[str, Any], **options: Any) -> int:
    """Returns the bytes that were sent."""
    before = len(pool.writes)
    options = {"reuse_unchanged": True, **options}
    dcp.save(state, storage_writer=states.writer(pool, f"{RUN}/step-{step}", **options))
    return sum(sum(sizes) for _, _, _, sizes in pool.writes[before:])


def load(pool: CheckpointPool, step: int, state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = blank(state)
    dcp.load(loaded, storage_reader=states.reader(pool, f"{RUN}/step-{step}"))
    return loaded


def stock_load(pool: CheckpointPool, step: int, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    pool.upload("s3", f"bucket/run/step-{step}")
    loaded: dict[str, Any] = blank(state)
    path = folder_of(pool, folder, f"bucket/run/step-{step}")
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(path))
    return loaded


def change(state: dict[str, Any], *numbers: int) -> None:
    for number in numbers:
        state[f"layer.{number:02d}"] += 1


def test_what_did_not_change_is_not_sent_again(
    pool: CheckpointPool, small_files: None, tmp_path: Path
) -> None:
    state = {**layers(), "step": 1, "note": "first"}
    first = save(pool, 1, state)
    change(state, 7)
    state["step"] = 2
    second = save(pool, 2, state)
    assert LAYER_BYTES < second < 2 * LAYER_BYTES < 0.1 * first
    assert_same(load(pool, 2, state), state)
    assert_same(stock_load(pool, 2, state, tmp_path / "c"), state)
    pool.evict()
    assert_same(load(pool, 2, state), state)


def test_over_many_saves_names_do_not_meet(pool: CheckpointPool, small_files: None) -> None:
    state = layers()
    save(pool, 0, state)
    for step in range(1, 12):
        change(state, step % 3, 10 + step % 5)
        save(pool, step, state)
        assert_same(load(pool, step, state), state)
        info = pool.saved["s3", f"bucket/run/step-{step}", ""]
        manifest = Manifest.decode(info.manifest, where="here")
        own = {
            object.key.rpartition("/")[2] for _, object, _, _ in pool.writes if info.save_id in object.version
        }
        assert not own & set(info.borrowed)
        assert own | set(info.borrowed) == set(manifest.files)
        assert len({path for path, _ in info.borrowed.values()}) <= 2


def test_where_everything_changed_nothing_is_asked_for(pool: CheckpointPool) -> None:
    state = layers()
    first = save(pool, 1, state)
    change(state, *range(LAYERS))
    assert save(pool, 2, state) == first
    assert not pool.borrowings


def test_what_changed_too_much_is_sent_apart_and_taken_over_the_next_time(
    pool: CheckpointPool, small_files: None
) -> None:
    state = layers()
    first = save(pool, 1, state)
    odd = range(1, LAYERS, 2)
    change(state, *odd)
    assert save(pool, 2, state) > 0.99 * first
    change(state, *odd)
    assert save(pool, 3, state) < 0.51 * first
    assert_same(load(pool, 3, state), state)


def test_a_run_that_lasts_stays_with_its_servers(pool: CheckpointPool, small_files: None) -> None:
    """And the saves of one that changes go where their paths are placed."""
    state = layers()
    save(pool, 1, state)
    change(state, *range(LAYERS))
    save(pool, 2, state)
    save(pool, 3, state)
    save(pool, 4, state)
    assert pool.asked_near == [(), (), (), ("only",)]


def test_what_is_not_lent_is_sent(pool: CheckpointPool, small_files: None) -> None:
    state = layers()
    first = save(pool, 1, state)
    pool.lends = False
    change(state, 3)
    assert save(pool, 2, state) > 0.99 * first
    assert pool.borrowings
    assert not pool.saved["s3", "bucket/run/step-2", ""].borrowed
    assert_same(load(pool, 2, state), state)


@pytest.mark.parametrize("options", [{"reuse_unchanged": False}, {"compression": "zstd"}])
def test_nothing_is_reused_where_it_was_not_asked_for(pool: CheckpointPool, options: dict[str, Any]) -> None:
    state = layers()
    first = save(pool, 1, state, **options)
    assert save(pool, 2, state, **options) == first
    assert not pool.borrowings


def test_another_folder_is_another_run(pool: CheckpointPool) -> None:
    state = layers()
    first = save(pool, 1, state)
    end_lease_of_thread()
    dcp.save(state, storage_writer=states.writer(pool, "s3://bucket/other/step-1", reuse_unchanged=True))
    assert not pool.borrowings
    assert sum(sum(sizes) for *_, sizes in pool.writes) == 2 * first


def test_a_save_that_failed_is_no_base(pool: CheckpointPool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = layers()
    save(pool, 1, state)
    change(state, 3)

    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("no")

    with monkeypatch.context() as patched:
        patched.setattr(pool, "commit_save", refuse)
        with pytest.raises(dcp.api.CheckpointException, match="no"):
            save(pool, 2, state)
    end_lease_of_thread()
    save(pool, 3, state)
    assert [base for (base, _), _ in pool.borrowings] == ["bucket/run/step-1"]
    assert_same(load(pool, 3, state), state)


# ---- where there is no room ----


class FullPool(CheckpointPool):
    """Refuses writes as long as `is_full` says so of the writing save's namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full: Callable[[str], bool] = lambda namespace: False
        self.refused: list[str] = []
        self.looks = 0

    def write(self, namespace: str, objects: Any, **options: Any) -> None:
        if self.is_full(namespace):
            self.refused.append(namespace)
            raise OutOfSpace("the store is full")
        super().write(namespace, objects, **options)

    def get_save(self, *where: Any, **options: Any) -> SaveInfo:
        self.looks += 1
        return super().get_save(*where, **options)

    @property
    def is_lending(self) -> bool:
        return bool(self.loans) and not self.returned


@pytest.fixture
def full_pool() -> Iterator[FullPool]:
    yield FullPool()
    end_lease_of_thread()


def test_what_was_lent_is_given_back_for_room_and_sent(full_pool: FullPool, small_files: None) -> None:
    """Though several files find none at a time: what had been sent already isn't sent again."""
    state = layers()
    first = save(full_pool, 1, state)
    change(state, *range(8))
    full_pool.is_full = lambda namespace: full_pool.is_lending
    assert save(full_pool, 2, state) == pytest.approx(first, rel=0.01)
    assert full_pool.refused
    (borrowed,) = (files for _, files in full_pool.borrowings)
    assert full_pool.returned == [borrowed]
    assert not full_pool.abandoned
    assert not full_pool.saved["s3", "bucket/run/step-2", ""].borrowed
    assert_same(load(full_pool, 2, state), state)
    full_pool.is_full = lambda namespace: False
    assert save(full_pool, 3, state) == 0
    assert full_pool.asked_near[-1] == (), "where it lay there was no room"
    assert_same(load(full_pool, 3, state), state)


def test_a_save_waits_for_the_upload_of_one_that_has_borrowed(
    full_pool: FullPool, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds more than its own size, until it is durable."""
    state = layers()
    save(full_pool, 1, state)
    change(state, 0)
    save(full_pool, 2, state)
    change(state, *range(LAYERS))
    before = full_pool.looks

    def sleep(_: float) -> None:
        if full_pool.looks == before + 3:
            full_pool.upload("s3", "bucket/run/step-2")

    monkeypatch.setattr(takeover.time, "sleep", sleep)
    full_pool.is_full = lambda _: full_pool.saved["s3", "bucket/run/step-2", ""].state != "durable"
    save(full_pool, 3, state)
    assert full_pool.looks == before + 4
    assert len(full_pool.abandoned) == 1, "first it was tried without looking for what could be borrowed"
    assert_same(load(full_pool, 3, state), state)


def test_a_save_waits_for_no_upload_of_one_that_has_not_borrowed(full_pool: FullPool) -> None:
    """It is refused then as it is when nothing is ever borrowed."""
    state = layers()
    save(full_pool, 1, state)
    change(state, *range(LAYERS))
    full_pool.is_full = lambda _: True
    with pytest.raises(dcp.api.CheckpointException, match="the store is full"):
        save(full_pool, 2, state)
    assert len(set(full_pool.refused)) == 2, "once more, where it would have been placed"


def test_a_save_that_finds_no_room_begins_anew_where_it_would_have_lain(
    full_pool: FullPool, small_files: None
) -> None:
    state = layers()
    for step in range(1, 4):
        save(full_pool, step, state)
    looks = full_pool.looks
    first_try: list[str] = []

    def is_full(namespace: str) -> bool:
        first_try[:] = first_try or [namespace]
        return [namespace] == first_try

    full_pool.is_full = is_full
    change(state, 3)
    save(full_pool, 4, state)
    assert full_pool.asked_near[-2:] == [("only",), ()]
    assert [f"save:s3/bucket/run/step-4@{id}" for id in full_pool.abandoned[-1:]] == first_try
    assert not full_pool.saved["s3", "bucket/run/step-4", ""].borrowed
    assert full_pool.looks == looks, "no upload was waited for"
    assert_same(load(full_pool, 4, state), state)


def test_a_state_that_lost_and_gained_tensors(pool: CheckpointPool, small_files: None) -> None:
    state = layers()
    save(pool, 1, state)
    del state["layer.00"]
    state["layer.01"] = state["layer.01"].to(torch.float64)
    state["layer.02"] = state["layer.02"].reshape(2, -1)
    state["new"] = torch.ones(LAYER_BYTES)
    save(pool, 2, state)
    assert_same(load(pool, 2, state), state)


# ---- comparing ----


def item_of(tensor: torch.Tensor, pool: CheckpointPool) -> KeptItem:
    dcp.save({"t": tensor}, storage_writer=states.writer(pool, f"{RUN}/step-0"))
    (item,) = Manifest.decode(pool.only_save().manifest, where="here").items
    return KeptItem.of(item, file_bytes=item.length, origin="id", origin_bytes=item.length)


@pytest.mark.parametrize("at", [0, GRANULE_BYTES // 4 - 1, GRANULE_BYTES // 4, -1])
def test_one_changed_element_is_seen(pool: CheckpointPool, at: int) -> None:
    tensor = torch.zeros(GRANULE_BYTES // 4 + 5)
    item = item_of(tensor, pool)
    assert is_unchanged(tensor.clone(), item)
    tensor[at] = -0.0  # equal, as numbers go
    assert not is_unchanged(tensor, item)


def test_only_what_is_written_from_its_own_memory_is_compared(pool: CheckpointPool) -> None:
    tensor = torch.arange(10_000, dtype=torch.float32).reshape(100, 100)
    item = item_of(tensor, pool)
    assert is_unchanged(torch.nn.Parameter(tensor.clone()), item)
    assert not is_unchanged(tensor.t(), item)
    assert not is_unchanged(tensor.t().contiguous(), item)
    assert not is_unchanged(tensor.view(torch.int32), item)
    assert not is_unchanged(tensor.reshape(-1), item)
    assert not is_unchanged(tensor.to("meta"), item)


# ---- which files ----


def kept(name: str, length: int, file: str, file_bytes: int, origin: str, origin_bytes: int = 1) -> KeptItem:
    return KeptItem(
        name=name,
        offset=None,
        index=None,
        kind="tensor",
        dtype="uint8",
        shape=(length,),
        file=file,
        start=0,
        length=length,
        payload_start=0,
        payload_length=length,
        frame_digest=0,
        digests=(0,),
        file_bytes=file_bytes,
        origin=origin,
        origin_bytes=origin_bytes,
    )


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100), st.integers(0, 5)), max_size=20))
def test_what_is_taken_over_is_mostly_of_use(files: list[tuple[int, int, int]]) -> None:
    items = [
        kept(f"t{n}", used, f"f{n}", used + stale, f"save {origin}")
        for n, (used, stale, origin) in enumerate(files)
    ]
    chosen = files_to_keep(items)
    by_file = {item.file: item for item in items}
    stale = sum(size - by_file[name].length for name, size in chosen.items())
    assert stale <= MOST_STALE * sum(chosen.values())
    assert len({by_file[name].origin for name in chosen}) <= reuse._MOST_ORIGINS
    clean = {item.file for item in items if item.length == item.file_bytes}
    if len({item.origin for item in items}) <= reuse._MOST_ORIGINS:
        assert clean <= set(chosen)


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30), st.integers(0, 3)), max_size=12),
    st.lists(st.integers(0, 500), min_size=4, max_size=4),
)
def test_no_earlier_save_is_kept_for_little(files: list[tuple[int, int, int]], others: list[int]) -> None:
    """`others`: bytes of each save that nothing of use lies in."""
    stored = list(others)
    for used, stale, origin in files:
        stored[origin] += used + stale
    items = [
        kept(f"t{n}", used, f"f{n}", used + stale, f"save {origin}", stored[origin])
        for n, (used, stale, origin) in enumerate(files)
    ]
    chosen = files_to_keep(items)
    by_file = {item.file: item for item in items}
    for origin in {by_file[name].origin for name in chosen}:
        taken = sum(size for name, size in chosen.items() if by_file[name].origin == origin)
        assert taken >= LEAST_TAKEN * stored[int(origin.removeprefix("save "))]
    stale = sum(size - by_file[name].length for name, size in chosen.items())
    assert stale <= MOST_STALE * sum(chosen.values())
    origins = {origin for _, _, origin in files}
    if len(origins) == 1 and not any(stale for _, stale, _ in files):
        assert bool(chosen) == (sum(used for used, _, _ in files) >= others[origins.pop()])


def test_what_lasts_is_sent_again_while_it_is_little(pool: CheckpointPool, small_files: None) -> None:
    """Else the pool would keep all of an earlier save for a few files of it."""
    state = layers()
    first = save(pool, 1, state)
    changing = range(4, LAYERS)
    for step in range(2, 5):
        change(state, *changing)
        assert save(pool, step, state) > 0.99 * first
    assert not pool.borrowings


def test_what_a_child_remembers_is_its_own() -> None:
    memory = Memory()
    memory.note_committed("s3", "", reuse.Base("run/step-1", "id", ("a",)))
    with memory._lock:  # as another thread may at the moment of a fork
        memory.forget()
        assert memory.base("s3", "run/step-2", "") is None


def test_a_process_remembers_a_few() -> None:
    memory = Memory()
    for number in range(10):
        memory.note_written(reuse.Written(str(number), 0, "", []))
        memory.note_committed("s3", "", reuse.Base(f"run-{number}/step-1", str(number), ("a",)))
    assert [n for n in range(10) if memory.written(str(n), 0, "")] == [6, 7, 8, 9]
    assert [n for n in range(10) if memory.base("s3", f"run-{n}/step-2", "")] == [6, 7, 8, 9]
    memory.note_written(reuse.Written("10", 0, "", []), instead_of="9")
    assert [n for n in range(11) if memory.written(str(n), 0, "")] == [6, 7, 8, 10]
    memory.note_written(reuse.Written("9", 0, "", []))
    assert memory.written("9", 1, "") is None
    assert memory.written("9", 0, "__0") is None
    assert memory.base("s3", "run-9/step-2", "__0") is None
