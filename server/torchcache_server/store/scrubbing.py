"""Reading what nobody reads, so that damage is found while there is still something to mend it from."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from torchcache.records import Location
from torchcache_server.store.core import Core
from torchcache_server.store.disk import UNREADABLE
from torchcache_server.store.reading import forget_if_replaceable
from torchcache_server.store.segments import Segment

_log = logging.getLogger(__name__)


class ScrubStep(NamedTuple):
    """What one step of a scrub verified. `damaged`: the namespaces of what was bad; `finished`: the round is over."""

    bytes: int
    chunks: int
    damaged: tuple[str, ...]
    finished: bool


@dataclass(slots=True)
class Scrub:
    """Goes round all segments, by number. `core` may change meanwhile; what is new is met in the next round."""

    core: Core
    _segment: int = 0  # where the next step begins: this segment, from this offset on
    _offset: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, max_bytes: int) -> ScrubStep:
        """Verifies the next records, about `max_bytes` of them, and takes out what is bad and may go."""
        core = self.core
        size = chunks = 0
        damaged: list[str] = []
        with self._lock:
            while size < max_bytes:
                if (
                    core.watch.out_of_service
                ):  # what it can't read now may be sound: nothing is to be forgotten
                    return ScrubStep(size, chunks, tuple(damaged), finished=True)
                segment = self._next()
                if segment is None:
                    self._segment = self._offset = 0
                    core.counts.add(scrub_rounds=1, scrubbed_bytes=size)
                    return ScrubStep(size, chunks, tuple(damaged), finished=True)
                for key, offset in core.index.members(segment.number):
                    if offset < self._offset:
                        continue
                    if size >= max_bytes or core.watch.out_of_service:
                        break
                    read, is_sound = self._verify(segment, key, offset)
                    if not is_sound:
                        damaged.append(segment.header.namespace)
                    size += read
                    chunks += 1
                    self._offset = offset + 1
                else:
                    self._segment, self._offset = segment.number + 1, 0
            core.counts.add(scrubbed_bytes=size)
            return ScrubStep(size, chunks, tuple(damaged), finished=False)

    def _next(self) -> Segment | None:
        with self.core.lock:
            number = min((n for n in self.core.space.segments if n >= self._segment), default=None)
            if number is None:
                return None
            if number != self._segment:
                self._segment, self._offset = number, 0
            return self.core.space.segments[number]

    def _verify(self, segment: Segment, key: bytes, offset: int) -> tuple[int, bool]:
        """Bytes read, about, and whether the record is sound; one that isn't is taken out if it may go."""
        core, location = self.core, Location(segment.number, offset)
        usual_bytes = segment.live_bytes // max(1, segment.chunks)
        try:
            record = segment.populated_record(core.disk, offset)
        except OSError as error:
            _log.warning("a record at %d in %s can't be read: %s", offset, segment.path, error)
            if error.errno not in UNREADABLE:
                return usual_bytes, True  # no word on the record
            forget_if_replaceable(core, key, location, is_readable=False)
            return usual_bytes, False
        if record is None or not segment.chunk(offset, record).is_intact():
            forget_if_replaceable(core, key, location)
            return usual_bytes, False
        core.damaged_kept.pop(location, None)
        return record.record_bytes, True
