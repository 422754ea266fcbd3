"""Files handed out to a client: what it writes is real by one commit, and nothing is left of what isn't committed."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.store import Policy, Store, handing_out

from tests.unit.handed_out_parts import NAMESPACE, Client, opened, sample, write_records
from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    FailingDisk,
    crash_image,
    fill,
    flip_bit,
    held,
    segment_files,
)
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    OutOfSpace,
    Overloaded,
    ServerUnavailable,
    TransientError,
)
from torchcache.lanes.local_writing import NotWritable
from torchcache.lanes.record_writing import FileCalls
from torchcache.model import ChunkId, ObjectId
from torchcache.records import SegmentHeader

MUCH = 8  # samples of a MiB fill a segment of 8 MiB and one to a small part
SIZE = MIB - 3


@pytest.fixture
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def store(tmp_path: Path, disk: FailingDisk) -> Iterator[Store]:
    with closing(Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)) as store:
        yield store


@pytest.fixture
def client(store: Store, tmp_path: Path) -> Client:
    return Client(store, tmp_path / "s", SIZE)


def prepare(store: Store, numbers: Sequence[int], size: int = SIZE, *, timeout_s: float = 60) -> Any:
    """As a client that goes no further."""
    chunks = [(ChunkId(sample(n, size).id, 0), size, size) for n in numbers]
    got = store.prepare_write(NAMESPACE, chunks, timeout_s=timeout_s)
    assert got is not None
    return got


def expire(store: Store, after_s: float) -> None:
    """As tidying does, `after_s` from now."""
    store._handing_out.expire(time.monotonic() + after_s)


def assert_nothing_left(store: Store, folder: Path) -> None:
    """I5: whatever was begun, nothing but spares is left of it."""
    assert store.usage().used_bytes == 0
    assert store.usage().segments == 0
    assert not segment_files(folder)
    assert store._handing_out.bytes == 0


def on_disk(folder: Path) -> int:
    files = [*segment_files(folder), *(folder / "spares").iterdir()]
    return sum(512 * f.stat().st_blocks for f in files)


def assert_books(store: Store, folder: Path) -> None:
    usage = store.usage()
    assert on_disk(folder) == usage.used_bytes + usage.spare_bytes <= CAPACITY


# ---- what works ----


def test_what_a_client_wrote_is_there_once_it_is_committed(
    store: Store, client: Client, tmp_path: Path
) -> None:
    seen: list[bool] = []
    client.calls.before = lambda method: seen.append(client.held(3)) if method == "CommitWrite" else None
    assert client.write(range(MUCH), durable=True) == MUCH * SIZE
    assert seen == [False]
    assert client.calls.made == ["PrepareWrite", "CommitWrite"]
    assert all(client.held(n) for n in range(MUCH))
    assert store.usage().chunks == MUCH
    assert store.namespaces()[0].name == NAMESPACE
    assert (client.calls.counters.write_calls, client.calls.counters.written_bytes) == (1, MUCH * SIZE)
    assert_books(store, tmp_path / "s")


@pytest.mark.parametrize("size", [5 * MIB - 1, 100_000, 1024, MIB + 16 * 1024])
def test_records_of_every_size(store: Store, tmp_path: Path, size: int) -> None:
    if size > 4 * MIB:
        size = 4 * MIB
    count = 9 * MIB // size
    client = Client(store, tmp_path / "s", size)
    client.write(range(count))
    assert all(client.held(n) for n in range(count))
    assert all(store.verify(ChunkId(sample(n, size).id, 0)) for n in range(count))


def test_it_survives_a_kill_of_the_server_once_it_is_committed(
    store: Store, client: Client, tmp_path: Path
) -> None:
    client.write(range(MUCH), durable=True)
    image = crash_image(tmp_path / "s", tmp_path / "image")
    with closing(Store(image, capacity_bytes=CAPACITY)) as again:
        client.calls.store = again
        assert all(client.held(n) for n in range(MUCH))


def test_a_durable_write_syncs_files_and_folder(store: Store, client: Client, disk: FailingDisk) -> None:
    client.write(range(MUCH))
    before = dict(disk.calls)
    client.write(range(100, 100 + MUCH), durable=True)
    assert disk.calls["fsync"] - before.get("fsync", 0) == 4  # two segments of each write
    assert disk.calls["fsync_dir"] > before["fsync_dir"]


def test_what_is_there_already_is_not_written_again(store: Store, client: Client) -> None:
    client.write(range(MUCH))
    before = store.usage().used_bytes
    assert client.write(range(2 * MUCH)) == 2 * MUCH * SIZE
    assert list(client.calls.replies["PrepareWrite"].file[:MUCH]) == [-1] * MUCH
    assert store.usage().used_bytes - before < (MUCH + 1) * MIB
    assert all(client.held(n) for n in range(2 * MUCH))


def test_files_of_segments_that_are_gone_are_written_again(
    store: Store, client: Client, tmp_path: Path
) -> None:
    client.write(range(7))
    inode = segment_files(tmp_path / "s")[0].stat().st_ino
    store.drop(NAMESPACE)
    client.write(range(7, 14))
    assert [f.stat().st_ino for f in segment_files(tmp_path / "s")] == [inode]
    assert all(client.held(n) for n in range(7, 14))
    assert_books(store, tmp_path / "s")


def test_the_unused_part_of_a_used_file_is_given_back(store: Store, client: Client, tmp_path: Path) -> None:
    client.write(range(7))
    store.drop(NAMESPACE)
    client.write(range(7, 12))
    assert store.usage().used_bytes < 6 * MIB
    assert_books(store, tmp_path / "s")


def test_nobody_else_writes_into_a_handed_out_file(store: Store, client: Client, tmp_path: Path) -> None:
    """Nor into the one before: of two records of a chunk the later has the higher number."""
    fill(store, NAMESPACE, range(2))
    client.write(range(5))
    fill(store, NAMESPACE, range(2, 4))
    headers = [SegmentHeader.decode(memoryview(f.read_bytes())) for f in segment_files(tmp_path / "s")]
    assert [h.handed_out for h in headers if h is not None] == [False, True, False]


def test_short_writes_go_on(store: Store, tmp_path: Path) -> None:
    class Short(FileCalls):
        def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
            return os.pwrite(fd, b"".join(map(bytes, buffers))[:300_000], offset)

    client = Client(store, tmp_path / "s", SIZE, files=Short())
    client.write(range(MUCH))
    assert all(client.held(n) for n in range(MUCH))


def test_little_is_left_to_the_other_lane(store: Store, client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotWritable):
        client.write(range(1))
    with pytest.raises(NotWritable):
        client.write(range(2))
    assert client.calls.made == ["PrepareWrite"]
    assert_nothing_left(store, tmp_path / "s")


# ---- who does what was not agreed ----


def test_a_commit_of_what_was_not_written_fails_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    got = prepare(store, range(MUCH))
    with pytest.raises(IntegrityError, match="write it again"):
        store.commit_write(got.write_id)
    assert not store.contains(ChunkId(sample(0, SIZE).id, 0))
    assert_nothing_left(store, tmp_path / "s")
    with pytest.raises(TransientError, match="write again"):
        store.commit_write(got.write_id)


@pytest.mark.parametrize("wrong", ["key", "index", "size", "payload", "nonce", "offset"])
def test_a_commit_of_other_records_than_were_agreed_fails(
    store: Store, client: Client, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchcache.lanes import record_writing

    real = record_writing.encode_record

    def encode(header: Any, nonce: int, offset: int) -> bytes:
        match wrong:
            case "key":
                header = header._replace(identity=header.identity.replace(b"written", b"WRITTEN"))
            case "index":
                header = header._replace(chunk_index=1)
            case "size":
                header = header._replace(object_size=header.object_size + 1)
            case "payload":
                header = header._replace(payload_bytes=header.payload_bytes - 1)
            case "nonce":
                nonce ^= 1
            case _:
                offset += 64
        return real(header, nonce, offset)

    monkeypatch.setattr(record_writing, "encode_record", encode)
    with pytest.raises(IntegrityError):
        client.write(range(MUCH))
    assert_nothing_left(store, tmp_path / "s")


def test_a_commit_of_no_write_at_all(store: Store) -> None:
    for write_id in ("", "0" * 32, "../../etc"):
        with pytest.raises(TransientError, match="write again"):
            store.commit_write(write_id)
        store.abandon_write(write_id)


def test_a_client_hears_that_its_write_is_not_known(store: Store, client: Client, tmp_path: Path) -> None:
    """As after a restart of the server: it has to write again, and may."""
    client.calls.before = lambda method: store._handing_out.close() if method == "CommitWrite" else None
    with pytest.raises(TransientError, match="write again"):
        client.write(range(MUCH))
    assert_nothing_left(store, tmp_path / "s")
    client.calls.before = lambda _: None
    client.write(range(MUCH))
    assert all(client.held(n) for n in range(MUCH))


def test_a_chunk_comes_once(store: Store) -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        prepare(store, [1, 2, 3, 4, 1])


def test_what_clients_hold_is_bounded(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing_out, "MAX_WRITES", 3)
    writes = [prepare(store, range(5 * i, 5 * i + 5)) for i in range(3)]
    with pytest.raises(Overloaded, match="try again"):
        prepare(store, range(100, 105))
    monkeypatch.setattr(handing_out, "MAX_WRITES", 64)
    writes += [prepare(store, range(5 * i, 5 * i + 5)) for i in range(3, 6)]
    with pytest.raises(Overloaded, match="try again"):  # half of the store
        prepare(store, range(100, 105))
    for got in writes:
        store.abandon_write(got.write_id)
    assert_nothing_left(store, tmp_path / "s")
    whole = prepare(store, range(50))  # one alone may take more
    store.abandon_write(whole.write_id)
    assert_nothing_left(store, tmp_path / "s")


# ---- who is gone, and who only seems so ----


def test_a_client_that_never_came_is_given_up(store: Store, tmp_path: Path) -> None:
    prepare(store, range(MUCH))
    expire(store, handing_out.OPENING_S - 1)
    assert store.usage().segments == 2
    expire(store, handing_out.OPENING_S)
    assert_nothing_left(store, tmp_path / "s")


def test_a_client_that_holds_its_files_has_until_its_time_is_over(store: Store, tmp_path: Path) -> None:
    prepare(store, range(MUCH), timeout_s=50)
    fd = os.open(segment_files(tmp_path / "s")[1], os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    expire(store, 45)
    assert store.usage().segments == 2
    expire(store, 50)
    assert_nothing_left(store, tmp_path / "s")
    os.close(fd)


def test_a_client_that_is_gone_is_noticed(store: Store, tmp_path: Path) -> None:
    """Without waiting for the end of its time: it held its files, and doesn't any more."""
    prepare(store, range(MUCH))
    expire(store, 0)
    fd = os.open(segment_files(tmp_path / "s")[0], os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    expire(store, 0)
    assert store.usage().segments == 2
    os.close(fd)
    expire(store, 0)
    assert_nothing_left(store, tmp_path / "s")


def test_the_books_are_right_about_a_used_file_that_a_client_has_made_longer(
    store: Store, client: Client, tmp_path: Path
) -> None:
    client.write(range(5))
    store.drop(NAMESPACE)
    assert store.usage().spare_bytes
    got = prepare(store, range(7))
    with opened(tmp_path / "s", NAMESPACE, got) as fds:
        write_records(fds, got, [(ChunkId(sample(n, SIZE).id, 0), SIZE, bytes(SIZE)) for n in range(7)])
    store.abandon_write(got.write_id)
    assert_nothing_left(store, tmp_path / "s")
    assert_books(store, tmp_path / "s")


def test_tidying_gives_back(store: Store, tmp_path: Path) -> None:
    prepare(store, range(MUCH), timeout_s=1e-9)
    store.tidy()
    assert_nothing_left(store, tmp_path / "s")


def test_who_writes_on_after_its_time_hurts_nobody(store: Store, client: Client, tmp_path: Path) -> None:
    """A file that is held becomes no other segment; a client that finds another in its place lets it be."""
    client.write(range(7))
    store.drop(NAMESPACE)  # a spare: the next write gets it
    prepare(store, range(7), timeout_s=1)
    [file] = segment_files(tmp_path / "s")
    zombie = os.open(file, os.O_RDWR)
    fcntl.flock(zombie, fcntl.LOCK_SH)
    expire(store, 1)
    assert_nothing_left(store, tmp_path / "s")
    assert store.usage().spare_bytes
    client.write(range(10, 17))
    fill(store, "other", range(7), MIB)
    assert os.fstat(zombie).st_ino not in {f.stat().st_ino for f in segment_files(tmp_path / "s")}
    os.pwrite(zombie, b"late" * MIB, 0)
    os.close(zombie)
    assert all(client.held(n) for n in range(10, 17))
    assert all(held(store, n, MIB) for n in range(7))
    fill(store, "third", range(20, 27), MIB)  # nobody holds it now
    assert store.usage().recycled_segments == 2
    assert all(held(store, n, MIB) for n in range(20, 27))


def test_a_client_that_opens_too_late_finds_another_file(
    store: Store, client: Client, tmp_path: Path
) -> None:
    """Its time was over between the answer and the opening, and the file is another segment by now."""
    client.write(range(7))
    store.drop(NAMESPACE)

    class Late(FileCalls):
        def hold(self, fd: int) -> bool:
            if not store.usage().chunks:
                expire(store, 100)
                fill(store, "other", range(7), MIB)
            return super().hold(fd)

    late = Client(store, tmp_path / "s", SIZE, files=Late())
    with pytest.raises(NotWritable, match="another"):
        late.write(range(7))
    assert store.usage().recycled_segments == 2
    assert all(held(store, n, MIB) for n in range(7))


def test_a_lock_that_somebody_has_alone_for_a_moment_is_waited_for(store: Store, tmp_path: Path) -> None:
    class Busy(FileCalls):
        tries = 0

        def hold(self, fd: int) -> bool:
            self.tries += 1
            return self.tries > 3 and super().hold(fd)

    files = Busy()
    client = Client(store, tmp_path / "s", SIZE, files=files)
    client.write(range(5))
    assert files.tries == 4


def test_a_stop_in_order_gives_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    got = prepare(store, range(MUCH))
    store.close()
    with pytest.raises(ServerUnavailable):
        store.commit_write(got.write_id)
    with closing(Store(tmp_path / "s", capacity_bytes=CAPACITY)) as again:
        assert_nothing_left(again, tmp_path / "s")


def test_after_a_kill_whole_records_are_kept_and_the_file_is_left_to_its_client(
    store: Store, client: Client, tmp_path: Path
) -> None:
    """A client that knows nothing of the restart writes on: nothing of the new server's is in that file."""
    fill(store, "kept", range(2))
    image = tmp_path / "image"

    def kill(method: str) -> None:
        if method == "CommitWrite":
            crash_image(tmp_path / "s", image)

    client.calls.before = kill
    client.write(range(5))
    [_, file] = segment_files(image)
    written = file.read_bytes()
    os.truncate(file, 3 * MIB)  # the last two didn't come
    with closing(Store(image, capacity_bytes=CAPACITY)) as again:
        client.calls.store = again
        assert [client.held(n) for n in range(5)] == [True, True, False, False, False]
        fill(again, NAMESPACE, range(10, 13))
        file.write_bytes(written)
        assert all(held(again, n) for n in (0, 1, 10, 11, 12))
        assert [client.held(n) for n in range(5)] == [True, True, False, False, False]


def test_a_segment_whose_header_was_made_again_takes_nothing_more(
    store: Store, client: Client, tmp_path: Path
) -> None:
    """Nobody can tell any more whether it was handed out."""
    store.keep(NAMESPACE, True)
    client.write(range(5))
    image = crash_image(tmp_path / "s", tmp_path / "image")
    [file] = segment_files(image)
    flip_bit(file, 20)
    with closing(Store(image, capacity_bytes=CAPACITY)) as again:
        client.calls.store = again
        assert all(client.held(n) for n in range(5))
        fill(again, NAMESPACE, range(2))
        assert len(segment_files(image)) == 2


def test_after_a_kill_nothing_is_left_of_what_was_never_written(store: Store, tmp_path: Path) -> None:
    prepare(store, range(MUCH))
    image = crash_image(tmp_path / "s", tmp_path / "image")
    with closing(Store(image, capacity_bytes=CAPACITY)) as again:
        assert_nothing_left(again, image)


# ---- room ----


def test_what_is_handed_out_is_not_evicted(store: Store) -> None:
    got = prepare(store, range(20))
    with pytest.raises(OutOfSpace):
        fill(store, "other", range(100, 160), MIB)
    assert store.usage().segments
    store.abandon_write(got.write_id)
    fill(store, "other", range(100, 140), MIB)


def test_a_namespace_that_is_dropped_meanwhile(store: Store, client: Client, tmp_path: Path) -> None:
    """Nothing comes of the write, as of any other."""
    client.calls.before = lambda method: store.drop(NAMESPACE) if method == "CommitWrite" else None
    client.write(range(MUCH))
    assert not client.held(0)
    assert_nothing_left(store, tmp_path / "s")


def test_others_yield_to_a_write(store: Store, client: Client, tmp_path: Path) -> None:
    fill(store, "old", range(100, 160), MIB)
    client.write(range(MUCH))
    assert store.usage().evicted_chunks
    assert all(client.held(n) for n in range(MUCH))
    assert_books(store, tmp_path / "s")


def test_a_full_store_refuses(store: Store, client: Client) -> None:
    fill(store, "old", range(100, 150), MIB)
    store.keep("old", True)
    with pytest.raises(OutOfSpace, match="full"):
        client.write(range(20))


def test_a_quota_holds(store: Store, client: Client, tmp_path: Path) -> None:
    store.set_policy(NAMESPACE, Policy(quota_bytes=6 * MIB))
    with pytest.raises(OutOfSpace, match="quota"):
        client.write(range(MUCH))
    client.write(range(5))


def test_a_disk_out_of_service_refuses(store: Store, client: Client, disk: FailingDisk) -> None:
    disk.fail("pwritev", errno.EIO, times=3)
    for n in range(3):
        with pytest.raises(OutOfSpace):
            fill(store, "n", range(n, n + 1))
    assert store.health().out_of_service
    with pytest.raises(OutOfSpace, match="out of service"):
        client.write(range(MUCH))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_client_whose_disk_fails_leaves_it_to_the_other_lane(
    store: Store, tmp_path: Path, code: int
) -> None:
    class Failing(FileCalls):
        written = 0

        def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
            self.written += 1
            if self.written > 3:
                raise OSError(code, os.strerror(code))
            return super().pwritev(fd, buffers, offset)

    client = Client(store, tmp_path / "s", SIZE, files=Failing())
    with pytest.raises(NotWritable):
        client.write(range(MUCH))
    assert_nothing_left(store, tmp_path / "s")


def test_a_header_that_the_server_cannot_read_back_is_an_error(
    store: Store, client: Client, disk: FailingDisk, tmp_path: Path
) -> None:
    client.calls.before = lambda m: disk.fail("pread", errno.EIO, times=1) if m == "CommitWrite" else None
    with pytest.raises(Exception, match="read back"):
        client.write(range(MUCH))
    assert_nothing_left(store, tmp_path / "s")


# ---- servers that lie ----


@pytest.mark.parametrize(
    "lie", ["offset", "unaligned", "header", "file", "fewer", "nonce", "number", "size", "negative"]
)
def test_a_server_that_lies_gets_nothing_written(
    store: Store, client: Client, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client.calls.call

    def call(method: str, request: Any, *, deadline: float) -> Any:
        reply = real(method, request, deadline=deadline)
        if method == "PrepareWrite":
            match lie:
                case "offset":
                    reply.offset[0] = 8 * MIB - 64
                case "unaligned":
                    reply.offset[0] += 1
                case "header":
                    reply.offset[0] = 0
                case "negative":
                    reply.offset[0] = -64
                case "file":
                    reply.file[0] = 7
                case "fewer":
                    del reply.offset[-1]
                case "nonce":
                    reply.files[0].nonce ^= 1
                case "number":
                    reply.files[0].number += 1
                case "size":
                    reply.files[0].size *= 2
        return reply

    monkeypatch.setattr(client.calls, "call", call)
    with pytest.raises(NotWritable):
        client.write(range(5))
    assert_nothing_left(store, tmp_path / "s")


def test_a_symlink_in_the_place_of_a_file_is_not_followed(
    store: Store, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client.calls.call

    def call(method: str, request: Any, *, deadline: float) -> Any:
        reply = real(method, request, deadline=deadline)
        if method == "PrepareWrite":
            [file] = segment_files(tmp_path / "s")
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        return reply

    monkeypatch.setattr(client.calls, "call", call)
    with pytest.raises(NotWritable):
        client.write(range(5))


def test_a_chunk_that_no_record_holds_is_refused(store: Store) -> None:
    long = ChunkId(ObjectId("samples", "k" * 20_000, "1"), 0)
    with pytest.raises(ConfigurationError, match="name of object"):
        store.prepare_write(NAMESPACE, [(long, SIZE, SIZE)], timeout_s=1)
