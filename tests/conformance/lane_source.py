"""What every lane must do where a real source stands behind the server: fills, changes, damage, deaths, forks."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.conformance.lane import (
    RANGES,
    RANGES_SIZE,
    SIZES,
    good,
    put_sample,
    read,
    sample,
    soon,
    until_well,
)
from tests.conformance.lane_server import LaneServer, ServerContract
from tests.integration.self_describing import content, part
from torchcache.errors import (
    IntegrityError,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
    TransientError,
)
from torchcache.lanes.base import Lane, Outcome
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, Extent, ObjectInfo

Harm = Callable[[bytearray, int, int], None]
"""Of a segment's bytes, and the place and length of a payload in it."""


def flip(data: bytearray, at: int, length: int) -> None:
    data[at + length // 2] ^= 1 << 3


def flip_last(data: bytearray, at: int, length: int) -> None:
    data[at + length - 1] ^= 1 << 7


def zeros(data: bytearray, at: int, length: int) -> None:
    data[at : at + length] = bytes(length)


def shift(data: bytearray, at: int, length: int) -> None:
    """Sound bytes of the same object, at the wrong place."""
    data[at : at + length - 64] = data[at + 64 : at + length]


def header(data: bytearray, at: int, length: int) -> None:
    """What the record says of itself."""
    data[at - 200 : at] = os.urandom(200)


HARMS = [flip, flip_last, zeros, shift, header]


def serve_reads(lane: Lane, extents: list[Extent], namespace_of: str, done: Connection) -> None:
    """In another process: reads once, and says what came."""
    from torchcache.lanes.base import ReadOptions

    outcomes = read(lane, extents, options=ReadOptions(namespace=namespace_of))
    done.send([o if isinstance(o, TorchCacheError) else bytes(o) for o in outcomes])


class SourceContract(ServerContract):
    """The contract of a lane to a real server with an under-store."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Iterator[LaneServer]:
        """A server of the test's own, to be harmed."""
        with LaneServer(tmp_path) as server:
            yield server

    # ---- fills ----

    def test_every_size_cold_and_warm(self, server: LaneServer, lane: Lane) -> None:
        infos = {size: server.make(f"sizes/{size}", size) for size in SIZES}
        extents = [Extent(info) for info in infos.values()]
        for resident_only in (False, True):
            options = server.options("sizes", resident_only=resident_only)
            for size, outcome in zip(infos, read(lane, extents, options=options), strict=True):
                assert good(outcome) == content(f"sizes/{size}", 0, size), size

    def test_ranges_cold_and_warm(self, server: LaneServer, lane: Lane) -> None:
        """Cold ones each by itself, over three objects, so that most meet chunks that aren't there."""
        keys = [f"ranges/{number}" for number in range(3)]
        infos = [server.make(key, RANGES_SIZE) for key in keys]
        options = server.options("ranges")
        spans = [(start, RANGES_SIZE if length < 0 else start + length) for start, length in RANGES]
        for turn, (start, end) in enumerate(spans):
            (outcome,) = read(lane, [Extent(infos[turn % 3], start, end - start)], options=options)
            assert good(outcome) == part(keys[turn % 3], 0, start, end), (start, end)
        for key, info in zip(keys, infos, strict=True):
            outcomes = read(lane, [Extent(info, a, b - a) for a, b in spans], options=options)
            assert [good(o) == part(key, 0, a, b) for o, (a, b) in zip(outcomes, spans, strict=True)] == [
                True
            ] * len(spans)

    def test_cold_and_warm_and_missing_in_one_call(self, server: LaneServer, lane: Lane) -> None:
        sizes = [1000 + 4099 * i for i in range(30)]
        infos = [server.make(f"mixed/{i}", size) for i, size in enumerate(sizes)]
        options = server.options("mixed")
        for outcome in read(lane, [Extent(info) for info in infos[::2]], options=options):
            good(outcome)
        server.remove("mixed/1")
        memory = [memoryview(bytearray(size)) if i % 3 == 0 else None for i, size in enumerate(sizes)]
        outcomes = read(lane, [Extent(info) for info in infos], memory, options=options)
        assert isinstance(outcomes[1], ObjectNotFound)
        assert "mixed/1" in str(outcomes[1])
        for i, outcome in enumerate(outcomes):
            if i != 1:
                assert good(outcome) == content(f"mixed/{i}", 0, sizes[i])

    def test_what_is_not_resident_is_not_fetched_if_so_asked(self, server: LaneServer, lane: Lane) -> None:
        info = server.make("absent/1", 1000)
        options = server.options("absent", resident_only=True)
        assert isinstance(read(lane, [Extent(info)], options=options)[0], NotResident)
        assert isinstance(read(lane, [Extent(info)], options=options)[0], NotResident), "nor behind our back"

    def test_an_evicted_object_is_fetched_again(self, server: LaneServer, lane: Lane) -> None:
        """And views of what was evicted stay what they were."""
        info = server.make("evicted/1", 3 * CHUNK_BYTES)
        right = content("evicted/1", 0, info.size)
        options, extents = server.options("evicted"), [Extent(info)]
        good(*read(lane, extents, options=options))
        view = good(*read(lane, extents, options=options))
        server.evict("evicted")
        only = server.options("evicted", resident_only=True)
        assert isinstance(read(lane, extents, options=only)[0], NotResident)
        assert good(*read(lane, extents, options=options)) == right
        assert view == right

    # ---- changes in the source ----

    def test_a_changed_object_is_an_error_and_never_a_mixture(self, server: LaneServer, lane: Lane) -> None:
        old = server.make("changed/1", 2 * CHUNK_BYTES)
        options = server.options("changed")
        good(*read(lane, [Extent(old, 0, 10)], options=options))  # its first chunk is resident now
        new = server.make("changed/1", 2 * CHUNK_BYTES, generation=1)
        first, whole, second = read(
            lane, [Extent(old, 0, CHUNK_BYTES), Extent(old), Extent(old, CHUNK_BYTES, 10)], options=options
        )
        assert good(first) == part("changed/1", 0, 0, CHUNK_BYTES)
        assert isinstance(whole, ObjectChanged)
        assert isinstance(second, ObjectChanged)
        assert "changed/1" in str(second)
        assert good(*read(lane, [Extent(new)], options=options)) == content("changed/1", 1, new.size)

    def test_one_that_became_shorter_or_longer(self, server: LaneServer, lane: Lane) -> None:
        old = server.make("resized/1", 50_000)
        server.make("resized/1", 40_000, generation=1)
        for lie in (old, ObjectInfo(old.id, 40_000)):
            assert isinstance(read(lane, [Extent(lie)], options=server.options("resized"))[0], ObjectChanged)

    # ---- damage on disk ----

    @pytest.mark.parametrize("harm", HARMS)
    @pytest.mark.parametrize("size", [40_000, 2 * CHUNK_BYTES + 40_000])
    def test_damage_is_never_served_and_mended_once_told(
        self, server: LaneServer, lane: Lane, harm: Harm, size: int
    ) -> None:
        """F5: the reader finds it out; asked as suspect, the server puts it right from the source."""
        name = f"{harm.__name__}-{size}"
        key = f"{name}/1"
        info = server.make(key, size)
        right = content(key, 0, size)
        options = server.options(name)
        good(*read(lane, [Extent(info)], options=options))
        good(*read(lane, [Extent(info)], options=options))  # header and all are known by now
        start = size - size % CHUNK_BYTES
        path, at = server.find(right[start:])
        with path.open("r+b") as file:
            data = bytearray(file.read())
            harm(data, at, size - start)
            file.seek(0)
            file.write(data)
        extents = [Extent(info), Extent(info, start, 20_000), Extent(info, start + BLOCK_BYTES, -1)]
        for extent, outcome in zip(extents, read(lane, extents, options=options), strict=True):
            assert isinstance(outcome, IntegrityError) or outcome == right[extent.offset :][: len(outcome)]
        suspect = server.options(name, suspect=True)
        for outcomes in (read(lane, extents, options=suspect), read(lane, extents, options=options)):
            assert [good(o) for o in outcomes] == [
                right,
                right[start : start + 20_000],
                right[start + BLOCK_BYTES :],
            ]

    def test_damage_elsewhere_in_a_chunk_is_no_matter(self, server: LaneServer, lane: Lane) -> None:
        info = server.make("elsewhere/1", 10 * BLOCK_BYTES)
        right = content("elsewhere/1", 0, info.size)
        options = server.options("elsewhere")
        good(*read(lane, [Extent(info)], options=options))
        path, at = server.find(right)
        with path.open("r+b") as file:
            file.seek(at + 5 * BLOCK_BYTES)
            file.write(b"\0\0\0\0")
        span = Extent(info, BLOCK_BYTES, 3 * BLOCK_BYTES)
        assert good(*read(lane, [span], options=options)) == right[BLOCK_BYTES : 4 * BLOCK_BYTES]

    def test_what_no_source_stands_behind_is_lost_and_said_to_be(
        self, server: LaneServer, lane: Lane
    ) -> None:
        """A computed sample: damaged it is an error first, then, once the server knows, one to compute again."""
        data = put_sample(lane, "lost", 70_000)
        extent = Extent(sample("lost", len(data)))
        assert good(*read(lane, [extent])) == data
        path, at = server.find(data)
        with path.open("r+b") as file:
            file.seek(at + 33_000)
            file.write(b"\0\0\0\0\0\0\0\0")
        assert isinstance(read(lane, [extent])[0], IntegrityError | NotResident)
        assert isinstance(read(lane, [extent], options=server.options("any", suspect=True))[0], NotResident)
        assert isinstance(read(lane, [extent])[0], NotResident)
        put_sample(lane, "lost", 70_000)
        assert good(*read(lane, [extent])) == data

    # ---- ends of servers ----

    def test_a_killed_server_and_its_successor(self, own: LaneServer) -> None:
        """Bytes or ServerUnavailable while it is away; right bytes from the next; views stay."""
        lane = self.make_lane(own)
        infos = [own.make(f"kill/{i}", 100_000) for i in range(20)]
        right = [content(f"kill/{i}", 0, 100_000) for i in range(20)]
        extents, options = [Extent(info) for info in infos], own.options("kill")
        good(*read(lane, extents[:1], options=options))
        views = [good(o) for o in read(lane, extents, options=options)]
        for number in (signal.SIGKILL, signal.SIGTERM):
            own.inner.end(number)
            for view, outcome in zip(views, read(lane, extents, options=options, seconds=10), strict=True):
                assert isinstance(outcome, TransientError) or outcome == view
            own.restart()
            assert [good(o) for o in until_well(lambda: read(lane, extents, options=options))] == right
            assert views == right
        lane.close()

    def test_a_server_killed_amid_reads(self, own: LaneServer) -> None:
        """I1, I4: whatever instant it dies at, bytes are right or the error is one to try again after."""
        lane = self.make_lane(own)
        infos = [own.make(f"amid/{i}", 300_000) for i in range(40)]
        right = [content(f"amid/{i}", 0, 300_000) for i in range(40)]
        extents, options = [Extent(info) for info in infos], own.options("amid")
        wrong: list[Outcome] = []
        turns = 0
        stop = threading.Event()

        def keep_reading() -> None:
            nonlocal turns
            while not stop.is_set():
                for outcome, data in zip(
                    read(lane, extents, options=options, seconds=20), right, strict=True
                ):
                    if not (isinstance(outcome, TransientError) or outcome == data):
                        wrong.append(outcome)
                turns += 1

        readers = [threading.Thread(target=keep_reading) for _ in range(2)]
        for reader in readers:
            reader.start()
        chance = random.Random(4)
        try:
            for _ in range(2):
                reached = turns + chance.randrange(1, 4)
                while turns < reached and not wrong:
                    stop.wait(0.001)
                own.inner.end(signal.SIGKILL)
                own.restart()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert not wrong
        assert [good(o) for o in until_well(lambda: read(lane, extents, options=options))] == right
        lane.close()

    # ---- forks and threads ----

    def test_a_forked_child_uses_the_lane_while_its_parent_does(self, server: LaneServer, lane: Lane) -> None:
        """F29: forked amid reads of other threads, holding views; and the parent goes on."""
        infos = [server.make(f"fork/{i}", 50_000) for i in range(10)]
        right = [content(f"fork/{i}", 0, 50_000) for i in range(10)]
        extents, options = [Extent(info) for info in infos], server.options("fork")
        held = read(lane, extents, options=options)
        stop, wrong = threading.Event(), []

        def keep_reading() -> None:
            while not stop.is_set():
                wrong.extend(
                    o
                    for o, data in zip(read(lane, extents, options=options), right, strict=True)
                    if o != data
                )

        readers = [threading.Thread(target=keep_reading) for _ in range(2)]
        for reader in readers:
            reader.start()
        context = multiprocessing.get_context("fork")
        try:
            for _ in range(3):
                receive, send = context.Pipe(duplex=False)
                child = context.Process(
                    target=serve_reads, args=(lane, extents, options.namespace, send), daemon=True
                )
                child.start()
                send.close()
                assert receive.poll(300), "a forked child hangs"
                assert receive.recv() == right
                child.join(300)
                receive.close()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert not wrong
        assert [good(o) for o in held] == right

    def test_nothing_is_left_open(self, server: LaneServer, lane: Lane) -> None:
        """I5: descriptors and mappings after a thousand reads are those after ten."""
        infos = [server.make(f"leak/{i}", 20_000) for i in range(10)]
        options = server.options("leak")

        def use() -> tuple[int, int]:
            for info in infos:
                good(*read(lane, [Extent(info)], options=options))
            maps = Path("/proc/self/maps").read_text().count(".segment")
            return sum(1 for _ in Path("/proc/self/fd").iterdir()), maps

        before = [use() for _ in range(5)][-1]
        after = [use() for _ in range(95)][-1]
        end = soon()
        # What was connected anew, or mapped, meanwhile is closed soon.
        while (after[0] > before[0] + 2 or after[1] > before[1]) and time.monotonic() < end:
            time.sleep(0.05)
            after = use()
        assert after[0] <= before[0] + 2, "gRPC opens one now and then"
        assert after[1] <= before[1]
