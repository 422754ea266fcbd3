"""What a server does until the power goes: each workload a hundred calls or so of the seam; a seed draws the chunks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Final
from unittest import mock

from torchcache_server.store import Policy

from tests.crash.world import KEY, NEXT_KEY, World, borrowing_id, payload
from tests.unit.write_back_world import soon

Workload = Callable[[World, random.Random], None]


def fills(world: World, rng: random.Random) -> None:
    """Two datasets, in turns; nothing is promised of them but I1."""
    world.open()
    at = rng.randrange(1000)
    for turn in range(5):
        count = rng.randrange(1, 4)
        world.put("ab"[turn % 2], *range(at, at + count))
        at += count
    world.sync("a")
    world.put("a", at)


def kept_data(world: World, rng: random.Random) -> None:
    """Data that is nowhere else, and records that must survive anything."""
    world.open()
    at = rng.randrange(1000)
    world.keep("kept", True)
    world.put("kept", at, at + 1)
    world.sync("kept")
    world.record(b"r", b"one")
    world.put("kept", *range(at + 2, at + 5))
    world.policy("pinned", Policy(pinned=True, priority=7))
    world.put("pinned", at + 10)
    world.record(b"r", b"two" * rng.randrange(1, 500))
    world.sync("kept")
    world.sync("pinned")
    world.record(b"q", b"another")
    world.policy("kept", Policy(pinned=True))
    world.keep("kept", False)
    world.record(b"q", None)
    world.policy("pinned", Policy(quota_bytes=1 << 20))
    world.policy("pinned", Policy())


def eviction(world: World, rng: random.Random) -> None:
    """The store is full of what may go, and of what may not."""
    world.open()
    at = rng.randrange(1000)
    world.keep("kept", True)
    world.put("kept", at, at + 1)
    world.put("old", *range(at + 10, at + 14))
    world.sync("kept")
    world.put("older", *range(at + 20, at + 24))
    world.sync("old")
    for namespace in ("old", "older"):
        world.may_go(namespace)
    for number in range(at + 100, at + 140, 4):
        world.put_if_room("new", *range(number, number + 4))
    world.put("kept", at + 2)
    world.sync("kept")


def dropping(world: World, rng: random.Random) -> None:
    """What was dropped is stored again elsewhere."""
    world.open()
    at = rng.randrange(1000)
    numbers = range(at, at + 3)
    world.keep("a", True)
    world.put("a", *numbers)
    world.sync("a")
    world.put("b", at + 10)
    world.drop("a")
    world.keep("b", True)
    world.put("b", *numbers)
    world.sync("b")
    world.put("a", at + 11)
    world.sync("a")
    world.drop("b")


def damage(world: World, rng: random.Random) -> None:
    """Records are found damaged, forgotten, and stored anew."""
    world.open()
    at = rng.randrange(1000)
    while len(payload(at)) < 1000:
        at += 1
    world.keep("a", True)
    world.put("a", at, at + 1, at + 2)
    world.sync("a")
    world.damage("a", at)
    world.quarantine("a", at)
    world.put("a", at)
    world.sync("a")
    world.quarantine("a", at + 1)
    world.put("b", at + 1)
    world.keep("b", True)
    world.sync("b")


def restarts(world: World, rng: random.Random) -> None:
    """Clean stops: the next server trusts the index."""
    at = rng.randrange(1000)
    world.open()
    world.keep("a", True)
    world.put("a", at, at + 1)
    world.put("b", at + 10)
    world.sync("a")
    world.stop()
    world.open()
    world.put("a", at + 2)
    world.put("b", at + 11)
    world.quarantine("b", at + 10)
    world.sync("a")
    world.record(b"r", b"one")
    world.stop()
    world.open()
    world.put("a", at + 3)
    world.drop("b")
    world.sync("a")
    world.put("b", at + 12)
    world.stop()


def recycling(world: World, rng: random.Random) -> None:
    """Segments become others, of other namespaces, and of those that they were of before."""
    world.open()
    at = rng.randrange(1000)
    world.keep("a", True)
    world.put("a", *_large(at, 6))
    world.sync("a")
    world.drop("a")
    world.keep("b", True)
    world.put("b", *_large(at + 100, 4))
    world.sync("b")
    world.keep("a", True)
    world.put("a", *_large(at + 200, 4))
    world.sync("a")
    world.put("c", *_large(at + 300, 3))
    world.drop("b")
    world.keep("b", True)
    world.put("b", at + 400)
    world.sync("b")
    world.evict("c")
    world.put("d", *_large(at + 500, 3))
    world.drop("a")
    world.put("b", *_large(at + 600, 3))
    world.sync("b")


def kept_late(world: World, rng: random.Random) -> None:
    """A dataset of which a part was evicted, for what must be kept, is to be kept itself from then on."""
    world.open()
    at = rng.randrange(1000)
    world.put("a", *_large(at, 12))
    world.keep("b", True)
    world.may_go("a")
    for number in _large(at + 200, 14):
        if world.there.usage().recycled_segments:
            break
        world.put("b", number)
    world.sync("b")
    world.keep("a", True)
    world.put("b", *_small(at + 300, 1))
    world.sync("b")
    world.sync("a")


def numbers_again(world: World, rng: random.Random) -> None:
    """The segment with the highest number goes; after a restart another one, of what must be kept, gets the number."""
    world.open()
    at = rng.randrange(1000)
    world.keep("b", True)
    world.put("b", *_small(at, 1))
    world.sync("b")
    numbers = _large(at + 100, 9)
    world.put("a", *numbers)
    world.sync("a")
    world.may_go("a")
    last = max(world.segment_of(number) for number in numbers)
    for number in numbers:
        if world.segment_of(number) == last:
            world.quarantine("a", number)
    world.tidy()
    world.stop()
    world.open()
    with mock.patch(
        "secrets.randbits", return_value=1
    ):  # of two files of one number the other's would be read last
        world.put("b", *_large(at + 200, 6))
    world.sync("b")


def compaction(world: World, rng: random.Random) -> None:
    """What is left of segments that are mostly dead moves on, and their files with it."""
    world.open()
    at = rng.randrange(1000)
    world.keep("kept", True)
    world.put("kept", *_large(at + 50, 2))
    world.sync("kept")
    large = _large(at, 5)
    world.put("a", *large, at + 100, at + 101)
    for number in large[:-1]:
        world.quarantine("a", number)
    world.tidy("a")
    world.put("a", at + 102)
    world.put("b", *_large(at + 200, 3))
    for number in _large(at + 200, 2):
        world.quarantine("b", number)
    world.sync("a")
    world.tidy("a", "b")
    world.put("kept", *_large(at + 60, 3))
    world.sync("kept")
    world.put("b", *large)


def upkeep(world: World, rng: random.Random) -> None:
    """A scrub that finds damage, a time to live that is over, a quota, room that is reserved first."""
    world.open()
    at = rng.randrange(1000)
    world.policy("short", Policy(ttl_s=1e-9))
    world.policy("limited", Policy(quota_bytes=60 * 1024, priority=-5))
    world.keep("kept", True)
    world.put("kept", *_large(at, 2))
    world.sync("kept")
    world.put("short", *_large(at + 100, 2))
    world.fill("limited", *_large(at + 200, 5))
    # Whether most of its segment is dead then, and the others are moved, is for the sizes to say.
    world.put("a", *_large(at + 300, 3))
    world.sync("a")
    world.damage("a", _large(at + 300, 1)[0])
    world.scrub()
    world.tidy("short")
    world.put("a", *_large(at + 300, 3))
    world.sync("a")
    # Here it always is.
    mostly, rest = _large(at + 500, 1), _small(at + 500, 3)
    world.put("b", *mostly, *rest)
    world.sync("b")
    world.damage("b", *mostly)
    world.scrub()
    world.tidy()
    world.put("kept", *_large(at + 400, 2))
    world.sync("kept")


def ordered(world: World, rng: random.Random) -> None:
    """With a known order the farthest next use yields: segments are compacted in part."""
    world.open()
    at = rng.randrange(1000)
    world.keep("kept", True)
    world.put("kept", at)
    world.sync("kept")
    numbers = _large(at + 100, 40)
    rng.shuffle(numbers)
    world.expect("a", *numbers, *numbers)
    world.fill("a", *numbers)
    world.put("kept", *_large(at + 10, 2))
    world.sync("kept")


def handed_out(world: World, rng: random.Random) -> None:
    """Clients write into files of their own: new ones, used ones, some to the end and some not."""
    world.open()
    at = rng.randrange(1000)
    world.keep("kept", True)
    world.put("kept", *_small(at, 1))
    world.client_writes("kept", *_large(at + 100, 5))
    world.sync("kept")
    world.client_dies("kept", *_large(at + 200, 4), written=rng.randrange(4))
    world.put("kept", *_small(at + 50, 1))
    world.put("a", *_large(at + 300, 4))
    world.drop("a")
    world.client_writes("kept", *_large(at + 400, 4))
    world.sync("kept")
    world.client_dies("b", *_large(at + 500, 4), written=rng.randrange(5))
    world.client_writes("c", *_large(at + 500, 5))
    world.sync("c")
    world.put("kept", *_small(at + 60, 1))
    world.sync("kept")


def _small(at: int, count: int) -> list[int]:
    """Numbers from `at` on whose payloads are some hundred bytes."""
    return list(itertools.islice((n for n in itertools.count(at) if len(payload(n)) <= 1000), count))


def _large(at: int, count: int) -> list[int]:
    """Numbers from `at` on whose payloads fill segments."""
    return list(itertools.islice((n for n in itertools.count(at) if len(payload(n)) >= 12_000), count))


def save_and_replace(world: World, rng: random.Random) -> None:
    """A checkpoint, uploaded, and the next one in its place; the old one is retired."""
    world.open()
    world.save(f"old-{rng.randrange(1000)}")
    world.upload()
    world.save(f"new-{rng.randrange(1000)}")
    world.upload()
    world.upload()


def replace_pending(world: World, rng: random.Random) -> None:
    """The next checkpoint is committed while the last one is nowhere else yet."""
    world.open()
    world.put("dataset", rng.randrange(1000))
    world.save(f"old-{rng.randrange(1000)}")
    world.save(f"new-{rng.randrange(1000)}")
    world.upload()
    world.write_back.tidy()
    world.stop()


def stop_while_saving(world: World, rng: random.Random) -> None:
    """The server is stopped with a checkpoint not yet uploaded, and another half written."""
    world.open()
    world.save(f"old-{rng.randrange(1000)}")
    world.stop()
    world.open()
    world.upload()
    world.save(f"new-{rng.randrange(1000)}")
    world.stop()
    world.open()
    world.write_back.tidy()
    world.upload()


def copies(world: World, rng: random.Random) -> None:
    """Of another server's saves: one is uploaded by it, one overtaken before it was confirmed, one is all there is."""
    world.open()
    first, second, third = (f"{name}-{rng.randrange(1000)}" for name in ("first", "second", "third"))
    world.copy(first)
    world.owner_commits(first)
    world.owner_uploads(first)
    world.write_back.tidy()
    world.copy(second)
    world.owner_commits(second, confirms=False)
    world.copy(third)
    world.owner_commits(third)
    world.write_back.tidy()
    world.stop()
    world.open()
    world.owner_is_silent()
    world.upload()
    world.write_back.tidy()


def copies_and_saves(world: World, rng: random.Random) -> None:
    """A copy under a save of this server's own, and the other way round; and one whose save never came about."""
    world.open()
    ours, theirs, never = (f"{name}-{rng.randrange(1000)}" for name in ("ours", "theirs", "never"))
    world.save(ours)
    world.upload()
    world.copy(theirs)
    world.owner_commits(theirs, confirms=rng.random() < 0.5)
    world.save(f"later-{rng.randrange(1000)}")
    world.upload()
    world.write_back.tidy()
    world.copy(never)
    world.write_back.drop_copy(KEY, never, deadline=soon())


def borrowing(world: World, rng: random.Random) -> None:
    """A checkpoint takes a file over from the one before, which goes: before the upload, or behind it."""
    world.open()
    world.save(f"first-{rng.randrange(1000)}")
    if rng.random() < 0.5:
        world.upload()
    world.save_borrowing(f"second-{rng.randrange(1000)}", NEXT_KEY, KEY)
    if rng.random() < 0.5:
        world.delete()
        world.upload(NEXT_KEY)
    else:
        world.upload(NEXT_KEY)
        world.delete()
    world.write_back.tidy()
    world.save_borrowing(f"third-{rng.randrange(1000)}", KEY, NEXT_KEY)
    world.delete(NEXT_KEY)


def borrowing_in_place(world: World, rng: random.Random) -> None:
    """It takes a file over from the one whose place it takes, and a restart comes in between."""
    world.open()
    world.save(f"first-{rng.randrange(1000)}")
    world.save_borrowing(f"second-{rng.randrange(1000)}", KEY, KEY)
    world.upload()
    if rng.random() < 0.5:
        world.stop()
        world.open()
    world.save_borrowing(f"third-{rng.randrange(1000)}", KEY, KEY)
    world.upload()
    world.upload()
    world.save_borrowing(f"fourth-{rng.randrange(1000)}", NEXT_KEY, KEY)
    world.delete()
    world.stop()


def borrowing_copies(world: World, rng: random.Random) -> None:
    """Of another server's saves, with a file of a copy that had done its duty, or hadn't; then that server is lost."""
    world.open()
    first = f"first-{rng.randrange(1000)}"
    world.copy(first)
    world.owner_commits(first)
    if rng.random() < 0.5:
        world.owner_uploads(first)
        world.write_back.tidy()
    second = borrowing_id(f"second-{rng.randrange(1000)}", KEY, first)
    world.copy(second, NEXT_KEY)
    world.owner_commits(second, NEXT_KEY)
    world.write_back.tidy()
    if rng.random() < 0.5:
        world.stop()
        world.open()
    world.owner_is_silent()
    world.upload(NEXT_KEY)
    world.write_back.tidy()


STORE_WORKLOADS: Final[dict[str, Workload]] = {
    workload.__name__: workload
    for workload in (
        fills,
        kept_data,
        eviction,
        dropping,
        damage,
        restarts,
        recycling,
        kept_late,
        numbers_again,
        compaction,
        upkeep,
        ordered,
        handed_out,
    )
}
SAVE_WORKLOADS: Final[dict[str, Workload]] = {
    workload.__name__: workload
    for workload in (
        *(save_and_replace, replace_pending, stop_while_saving, copies, copies_and_saves),
        *(borrowing, borrowing_in_place, borrowing_copies),
    )
}


# ---- after a restart ----


def go_on(world: World, rng: random.Random) -> None:
    """What the restarted server finds is made durable, and more is stored."""
    world.open()
    world.believe_what_is_there()
    at = 2000 + rng.randrange(1000)
    world.sync_what_is_there()
    world.put_if_room("kept", at, at + 1)
    world.keep("kept", True)
    world.sync("kept")
    world.record(b"r", b"later")
    world.record(b"q", None)
    if rng.random() < 0.5:
        world.stop()
        world.open()
    world.put_if_room("a", at + 2)
    world.keep("a", True)
    world.sync("a")


def go_on_saving(world: World, rng: random.Random) -> None:
    """Checkpoints that were there are uploaded, and another one is saved."""
    world.open()
    world.believe_what_is_there()
    world.write_back.tidy()
    if rng.random() < 0.5 and world.current():
        world.upload()
    world.save(f"next-{rng.randrange(1000)}")
    if rng.random() < 0.5 and not world.current(NEXT_KEY):
        world.save_borrowing(f"after-{rng.randrange(1000)}", NEXT_KEY, KEY)
    world.upload()
    world.upload()
