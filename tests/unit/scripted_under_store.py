"""An under-store whose reads the test holds back, counts and fails: S3 can't be told when to answer."""

from __future__ import annotations

import threading
import time

from torchcache.errors import TorchCacheError
from torchcache.model import ByteRange, ObjectId, ObjectInfo

_PATTERN = bytes(range(251))


class ScriptedUnderStore:
    """Objects of any size: byte i of every object is i % 251. Only `read` is there: nothing else is called.

    `answer` is set: reads are answered; cleared: they wait for it. `error`: they raise it.
    """

    name = "s3"

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.answer.set()
        self.error: TorchCacheError | None = None
        self.reads: list[tuple[str, ByteRange]] = []
        self.deadlines: list[float] = []
        self.under_way = 0
        self.most_under_way = 0
        self._changed = threading.Condition()

    def read(self, object: ObjectInfo, range: ByteRange, *, deadline: float) -> bytearray:
        with self._changed:
            self.reads.append((object.id.key, range))
            self.deadlines.append(deadline)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self._changed.notify_all()
        try:
            if not self.answer.wait(deadline - time.monotonic()):
                raise TimeoutError("the test never let the read go")
            if self.error is not None:
                raise self.error
            return bytearray(content(range))
        finally:
            with self._changed:
                self.under_way -= 1

    def wait_for_reads(self, count: int) -> None:
        """Returns once `count` reads have begun in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reads) >= count, timeout=30)


def content(range: ByteRange) -> bytes:
    """What every object holds there."""
    return (_PATTERN * (range.end // len(_PATTERN) + 1))[range.start : range.end]


def object_of(size: int, key: str = "key") -> ObjectInfo:
    return ObjectInfo(ObjectId("s3", key, "v1"), size)
