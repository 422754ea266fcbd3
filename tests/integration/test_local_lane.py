"""The local lane on real servers: what is read is right, whatever becomes of server, store, index and process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
import xxhash

from tests.integration.local_reader_child import NAMESPACE, Job, read, sample
from tests.integration.pool_server import Dataset, PoolServer
from tests.integration.self_describing import content, difference
from tests.integration.store_process_parts import Child
from tests.waiting import until
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError
from torchcache.lanes.local_reclaim import Reclaim
from torchcache.model import CHUNK_BYTES, Extent, ObjectInfo
from torchcache.pool import Pool
from torchcache.records import INDEX, INDEX_FILES

MIB = 1 << 20
ANSWER_S = 120.0
SIZES = [0, 1, 1000, 16_384, 114_660, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 77]
NOBODY = 65534


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    with PoolServer(tmp_path, capacity="256MiB") as server:
        yield server


def fill(pool: Pool, sizes: list[int] = SIZES) -> None:
    rows = [(sample(n), [content(sample(n).key, 0, size)]) for n, size in enumerate(sizes)]
    pool.write(NAMESPACE, rows)


def assert_local(pool: Pool, sizes: list[int] = SIZES) -> None:
    """Reads all, every byte right, and all of it from the store's files."""
    before = pool.statistics().local_extents
    assert read(pool, sizes) == len(sizes)
    assert pool.statistics().local_extents == before + len(sizes)


def child(server: PoolServer, *, lane: str = "auto", uid: int | None = None) -> Child:
    job = Job(
        address=server.address,
        token=server.token,
        store=str(server.store),
        sizes=SIZES,
        lane=lane,
        uid=uid,
    )
    return Child("tests.integration.local_reader_child", asdict(job))


def segment_files(server: PoolServer) -> list[Path]:
    return sorted((server.store / "segments").glob("*/*.segment"))


def mapped(server: PoolServer) -> list[str]:
    """Segments of the server that this process has mapped, as the kernel tells."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(server.store) in line and ".segment" in line]


def open_segments(server: PoolServer) -> list[str]:
    """Segments of the server that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:  # the folder itself, for one
            continue
    return [path for path in found if str(server.store) in path and ".segment" in path]


# ---- which lane ----


def test_the_local_lane_is_chosen_where_it_works(server: PoolServer) -> None:
    fill(server.pool)
    assert_local(server.pool)
    found = server.pool.statistics()
    assert found.lanes == {server.address: "local"}
    assert found.lane_reasons == {server.address: ""}
    assert found.local_bytes == sum(SIZES) == found.read_bytes


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_flight_lane_can_be_asked_for(
    server: PoolServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("TORCHCACHE_LANE", "flight")
    with closing(
        connect(server.address, token=server.token, lane="flight" if by == "argument" else None)
    ) as pool:
        fill(pool)
        assert read(pool, SIZES) == len(SIZES)
        assert pool.statistics().local_extents == 0
        assert pool.statistics().lanes == {server.address: "flight"}


def test_a_lane_that_does_not_exist_is_refused(server: PoolServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="'auto', 'local', 'flight'"):
        connect(server.address, lane="teleport")
    monkeypatch.setenv("TORCHCACHE_LANE", "teleport")
    with pytest.raises(ConfigurationError, match="teleport"):
        connect(server.address)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_falls_back_to_flight(server: PoolServer) -> None:
    fill(server.pool)
    for lane in ("auto", "local"):
        with closing(child(server, uid=NOBODY, lane=lane)) as stranger:
            if lane == "auto":
                answer = stranger.ask("lane", ANSWER_S)
                assert answer["lane"] == "flight"
                assert str(server.store) in str(answer["reason"])
                assert stranger.ask("read", ANSWER_S) == {"right": len(SIZES), "local": 0}
            else:
                answer = stranger.ask("read", ANSWER_S)
                assert answer["error"] == "ConfigurationError"
                assert "the local lane can't be used: the store" in str(answer["message"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees another user's files")
def test_a_store_that_is_readable_but_another_users_isnt_opened(server: PoolServer) -> None:
    """LMDB would make files there that the server can't open."""
    os.chown(server.store / "store.json", NOBODY, NOBODY)
    with closing(connect(server.address, token=server.token)) as pool:
        pool.status()
        assert pool.statistics().lanes == {server.address: "flight"}
        assert f"belongs to user {NOBODY}" in pool.statistics().lane_reasons[server.address]


@pytest.mark.parametrize("instead", ["nothing", "a copy", "another store"])
def test_a_store_that_isnt_the_servers_very_own_isnt_opened(
    server: PoolServer, tmp_path: Path, instead: str
) -> None:
    """As in another container, where a path may be anything."""
    fill(server.pool)
    kept = server.store.rename(tmp_path / "kept")
    try:
        if instead != "nothing":
            server.store.mkdir(mode=0o700)
            identity = (kept / "store.json").read_text()
            if instead == "another store":
                identity = identity.replace('"server_id": "', '"server_id": "not-')
            (server.store / "store.json").write_text(identity)
        with closing(connect(server.address, token=server.token)) as pool:
            assert read(pool, SIZES) == len(SIZES)
            assert pool.statistics().lanes == {server.address: "flight"}
            assert str(server.store) in pool.statistics().lane_reasons[server.address]
    finally:
        if server.store.exists():
            (server.store / "store.json").unlink()
            server.store.rmdir()
        kept.rename(server.store)


@pytest.mark.parametrize("kernel", ["", "another boot pid:[1]"])
def test_a_server_of_another_kernel_or_container_is_read_by_flight(
    server: PoolServer, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """LMDB over another host's file system must never be opened, nor share its locks with other process ids."""
    opened: list[str] = []
    monkeypatch.setattr("torchcache.lanes.local_store.kernel_id", lambda: kernel)
    monkeypatch.setattr("torchcache.lanes.local_store.LocalIndex", opened.append)
    with closing(connect(server.address, token=server.token)) as pool:
        fill(pool)
        assert read(pool, SIZES) == len(SIZES)
        assert pool.statistics().lanes == {server.address: "flight"}
        assert "another machine" in pool.statistics().lane_reasons[server.address]
    assert not opened


# ---- what is wrong on disk ----


def test_a_damaged_chunk_is_not_served_but_mended_in_the_same_call(server: PoolServer) -> None:
    sizes = [100_000, 5 * MIB, 70_000]
    data = Dataset(server, "d", sizes)
    data.read(server.pool)
    data.read(server.pool)
    for file in segment_files(server):
        with file.open("r+b") as opened:
            opened.seek(60_000)
            byte = opened.read(1)
            opened.seek(60_000)
            opened.write(bytes([byte[0] ^ 0x10]))
    before = server.pool.statistics().local_extents
    data.read(server.pool)
    assert server.status.corrupt == server.pool.statistics().suspects == 1
    assert server.pool.statistics().local_extents == before + len(sizes) - 1
    data.read(server.pool)
    assert server.pool.statistics().local_extents == before + 2 * len(sizes) - 1
    assert server.status.corrupt == 1


def test_a_damaged_computed_sample_is_said_to_be_gone(server: PoolServer) -> None:
    """Nothing stands behind it: it is computed again."""
    fill(server.pool, [100_000])
    assert_local(server.pool, [100_000])
    (file,) = segment_files(server)
    with file.open("r+b") as opened:
        opened.seek(60_000)
        opened.write(b"not what was stored")
    outcome = server.pool.read_each([Extent(ObjectInfo(sample(0), 100_000))], resident_only=True)[0]
    assert type(outcome).__name__ == "NotResident"


def test_a_file_that_lost_its_end_is_mended_in_the_same_call(
    server: PoolServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touching what isn't there would end the process by SIGBUS. The kernel is asked before, if it took any pages."""
    monkeypatch.setattr(Reclaim, "happened", lambda _: True)
    data = Dataset(server, "d", [3 * MIB] * 3)  # two are lost: the third error would be the disk's last
    data.read(server.pool)
    (file,) = segment_files(server)
    data.read(server.pool)
    assert mapped(server)
    os.truncate(file, 4 * MIB)
    data.read(server.pool)
    assert server.pool.statistics().suspects == 2
    server.status  # noqa: B018 - the server lives too
    before = server.pool.statistics().local_extents
    data.read(server.pool)
    assert server.pool.statistics().local_extents == before + 3


# ---- segments that go while they are looked at ----


@pytest.fixture
def small(tmp_path: Path) -> Iterator[PoolServer]:
    """One that holds about one of two datasets: to read them by turns recycles all there is."""
    with PoolServer(tmp_path, capacity="48MiB") as server:
        yield server


def test_what_somebody_looks_at_never_changes(small: PoolServer) -> None:
    """I1: while all else is evicted and its files are used again, views stay what they were."""
    a, b = (Dataset(small, name, [3 * MIB + 77] * 10) for name in ("a", "b"))
    held: list[tuple[memoryview, int]] = []
    for turn in range(6):
        (a, b)[turn % 2].read(small.pool)
        (a, b)[turn % 2].read(small.pool)
        extents = [Extent(info) for _, info in (a, b)[turn % 2]._objects[::3]]
        views = small.pool.read(extents)
        held = [*held[-4:], *((view, xxhash.xxh3_64_intdigest(view)) for view in views)]
        del views
        for view, digest in held:
            assert xxhash.xxh3_64_intdigest(view) == digest
    assert small.pool.statistics().local_extents > 20
    assert small.status.recycled_segments


def test_what_was_evicted_gives_its_room_back_once_anything_is_read(small: PoolServer) -> None:
    a = Dataset(small, "a", [3 * MIB] * 10)
    a.read(small.pool)
    a.read(small.pool)
    fill(small.pool, [1000])
    assert_local(small.pool, [1000])
    before = len(mapped(small))
    assert before > 3
    small.pool.evict(a.namespace)

    def let_go() -> bool:
        read(small.pool, [1000])
        return len(mapped(small)) == 1

    until(let_go, "the evicted segments are unmapped")
    assert not [line for line in mapped(small) if "(deleted)" in line]


def test_the_store_knows_who_is_read_locally_and_evicts_others(small: PoolServer) -> None:
    a, b, c = (Dataset(small, name, [3 * MIB] * 6) for name in ("a", "b", "c"))
    a.read(small.pool)
    b.read(small.pool)
    served = small.status.local_bytes

    def reported() -> bool:
        a.read(small.pool)
        return small.status.local_bytes > served

    until(reported, "a report of use")
    hits = small.status.hits
    assert hits >= small.status.local_chunks > 0
    c.read(small.pool)
    assert a.resident(small.pool) == 6
    assert b.resident(small.pool) < 6


def test_closing_a_pool_reports_what_it_read(server: PoolServer) -> None:
    fill(server.pool)
    with closing(connect(server.address, token=server.token)) as pool:
        assert_local(pool)
    status = server.status
    assert status.local_bytes >= sum(SIZES)
    assert status.local_chunks >= len(SIZES) + 3  # chunks beyond the first of each


_READS_AND_ENDS = """
import multiprocessing, os, sys
from tests.integration.local_reader_child import read
from torchcache.connecting import connect
from torchcache.lanes import local_unsaid

local_unsaid.EXIT_S = 60.0  # however busy the machine is
address, token, *sizes = sys.argv[1:]

def read_once():
    pool = connect(address, token=token)
    assert read(pool, [*map(int, sizes)]) == len(sizes) == pool.statistics().local_extents

read_once()
worker = multiprocessing.get_context("fork").Process(target=read_once)
worker.start()
worker.join()
assert worker.exitcode == 0
pid = os.fork()
if pid == 0:
    read_once()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_what_a_process_reads_before_it_ends_is_counted(server: PoolServer) -> None:
    """Each once: a script that has dropped its pool, a child of multiprocessing, as loaders' workers are, a fork."""
    fill(server.pool)
    arguments = [server.address, server.token, *map(str, SIZES)]
    subprocess.run([sys.executable, "-c", _READS_AND_ENDS, *arguments], check=True, timeout=300)
    assert server.status.local_bytes == 3 * sum(SIZES)


def test_few_descriptors_are_enough(small: PoolServer) -> None:
    """Each segment open would be one too many: a process may often have 1,024 of them."""
    a = Dataset(small, "a", [MIB] * 36)
    a.read(small.pool)
    assert len(segment_files(small)) > 5
    small.pool.close()
    with closing(connect(small.address, token=small.token, lane="local")) as pool:
        a.read(pool)
        assert pool.statistics().local_extents == 36
        assert len(mapped(small)) == len(segment_files(small))
        assert not open_segments(small)
    assert not mapped(small)


# ---- the server ends ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_comes_again_is_read_on(tmp_path: Path, number: signal.Signals) -> None:
    """After SIGKILL its index is made anew: other files at the same place."""
    with PoolServer(tmp_path, capacity="256MiB") as server:
        fill(server.pool)
        pool = server.pool
        assert_local(pool)
        index = server.store / INDEX / INDEX_FILES[0]
        before = index.stat().st_ino
        server.life.end(number)
        assert_local(pool)
        server.start()
        assert (index.stat().st_ino == before) == (number == signal.SIGTERM)
        more = [*SIZES, 2000]
        fill(server.pool, more)

        def all_local() -> bool:
            before = pool.statistics().local_extents
            assert read(pool, more) == len(more)
            return pool.statistics().local_extents == before + len(more)

        until(all_local, "the new index is noticed")
        pool.close()


def test_reads_go_on_while_the_server_is_killed_and_started_again(tmp_path: Path) -> None:
    with PoolServer(tmp_path, capacity="256MiB") as server:
        fill(server.pool)
        pool = server.pool
        failed: list[BaseException] = []
        turns = [0, 0, 0]
        stop = threading.Event()

        def keep_reading(who: int) -> None:
            try:
                while not stop.is_set():
                    assert read(pool, SIZES) == len(SIZES)
                    turns[who] += 1
            except BaseException as error:
                failed.append(error)

        readers = [threading.Thread(target=keep_reading, args=(who,)) for who in range(len(turns))]
        for reader in readers:
            reader.start()

        def read_on() -> None:
            reached = [turn + 2 for turn in turns]
            until(lambda: bool(failed) or all(t >= r for t, r in zip(turns, reached, strict=True)), "reads")

        try:
            for _ in range(2):
                read_on()
                server.life.end(signal.SIGKILL)
                server.start()
                # Not yet in the index, while it is made anew, is a miss like any other: these are computed samples.
            read_on()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        pool.close()
        assert not failed, failed


# ---- clients that die, and many of them ----


def test_a_reader_that_dies_within_a_transaction_keeps_nothing(server: PoolServer) -> None:
    """F28: while it lives pages it may see aren't used again; then they are, and the index stops growing."""
    index = server.store / INDEX / INDEX_FILES[0]

    def churn() -> int:
        for number in range(20):
            server.pool.write(f"samples:{number}@1", [(sample(1000 + number), [b"x" * 100])])
            server.pool.evict(f"samples:{number}@1")
        return index.stat().st_size

    def settled() -> int:
        """The size once the index grows no more."""
        sizes = [churn(), churn()]
        while sizes[-1] != sizes[-2]:
            assert len(sizes) < 60, f"it grows without end: {sizes}"
            sizes.append(churn())
        return sizes[-1]

    before = settled()
    with closing(child(server)) as reader:
        reader.ask("hold", ANSWER_S)
        with closing(child(server)) as other:
            assert reader.process.pid in other.ask("readers", ANSWER_S)["pids"]  # type: ignore[operator]
        grown = max(churn() for _ in range(10))
        assert grown > before, "while the reader lives its pages stay"
    with closing(child(server)) as other:

        def forgotten() -> bool:
            pids = other.ask("readers", ANSWER_S)["pids"]
            assert isinstance(pids, list)
            return reader.process.pid not in pids

        until(forgotten, "the dead reader is forgotten")
    assert churn() == settled()


def test_forks_under_load_leave_both_sides_right(server: PoolServer) -> None:
    """F29: threads look things up while the process is forked, over and over."""
    fill(server.pool)
    assert_local(server.pool)
    failed: list[BaseException] = []
    stop = threading.Event()

    def keep_reading() -> None:
        try:
            while not stop.is_set():
                assert read(server.pool, SIZES) == len(SIZES)
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=keep_reading) for _ in range(3)]
    for reader in readers:
        reader.start()
    held = server.pool.read([Extent(ObjectInfo(sample(4), SIZES[4]))])[0]
    try:
        for _ in range(8):
            pid = os.fork()
            if pid == 0:
                try:
                    right = not difference(sample(4).key, 0, 0, held)  # the parent's view
                    assert_local(server.pool)
                    grandchild = os.fork()
                    if grandchild == 0:
                        assert_local(server.pool)
                        os._exit(0)
                    right &= os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
                    os._exit(0 if right else 3)
                finally:
                    os._exit(4)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not failed, failed
    assert_local(server.pool)


def local_in_child(pool: Pool) -> tuple[int, int]:
    return read(pool, SIZES), pool.statistics().local_extents


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_read_locally_however_they_are_started(server: PoolServer, method: str) -> None:
    fill(server.pool)
    assert_local(server.pool)
    with multiprocessing.get_context(method).Pool(1) as workers:
        assert workers.apply(local_in_child, (server.pool,)) == (len(SIZES), len(SIZES))
    assert_local(server.pool)


def test_a_pickled_pool_keeps_its_lane(server: PoolServer) -> None:
    pool = connect(server.address, token=server.token, lane="flight")
    with closing(pickle.loads(pickle.dumps(pool))) as copy:
        fill(copy)
        assert read(copy, SIZES) == len(SIZES)
        assert copy.statistics().lanes == {server.address: "flight"}


def test_two_pools_of_a_process_share_a_store(server: PoolServer) -> None:
    """LMDB can't be opened twice in one process; and what one closes the other opens again."""
    fill(server.pool)
    with closing(connect(server.address, token=server.token, lane="local")) as other:
        assert_local(other)
        assert_local(server.pool)
        server.pool.close()
        assert_local(other)
        assert_local(server.pool)
