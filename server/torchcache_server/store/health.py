"""Whether the disk can be trusted: three errors of its own, and it is out of service until the server starts again.

Out of service nothing new is stored and what can be fetched elsewhere is a miss: reads pass through. What exists
nowhere else is still tried.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torchcache_server.store.disk import UNREADABLE, DiskCalls

TOO_MANY: Final = 3

_OF_THE_DISK: Final = frozenset({*UNREADABLE, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE})
_MAKING: Final = ("create", "make_dir")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Health:
    """Errors of the disk since the store was opened. `out_of_service` says why, and is empty while it is in service."""

    errors: int
    out_of_service: str


class Watch:
    """Counts errors. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors = 0
        self._unreadable: set[int] = set()
        self.out_of_service = ""

    @property
    def health(self) -> Health:
        with self._lock:
            return Health(self._errors, self.out_of_service)

    def note(self, call: str, error: OSError, *, address: int | None = None) -> None:
        """Counts the error if it is the disk's fault: no lack of room, descriptors or time.

        `address` is of what can't be read, if that is mapped: one bad place counts once, however often it is asked for.
        """
        # A folder that is gone, or a symlink now, shows where something is to be made in it.
        if error.errno not in _OF_THE_DISK and not (
            call in _MAKING and error.errno in (errno.ENOENT, errno.ENOTDIR)
        ):
            return
        with self._lock:
            if address in self._unreadable:
                return
            if address is not None:
                self._unreadable.add(address)
            self._errors += 1
            if self._errors < TOO_MANY or self.out_of_service:
                return
            self.out_of_service = f"{self._errors} disk errors, the last: {call}: {error}"
        _log.error(
            "the disk is out of service: %s; reads pass through, writes are refused, until it is mended and the "
            "server started again",
            self.out_of_service,
        )


class WatchedDisk(DiskCalls):
    """The calls of another disk, their errors noted. `watch` may be set once the store is open."""

    def __init__(self, disk: DiskCalls) -> None:
        self.disk = disk
        self.watch: Watch | None = None


def _watched(name: str) -> Callable[..., Any]:
    def call(self: WatchedDisk, *arguments: Any) -> Any:
        try:
            return getattr(self.disk, name)(*arguments)
        except OSError as error:
            if self.watch is not None:
                mapped = arguments[0].address + arguments[1] if name == "populate" else None
                self.watch.note(name, error, address=mapped)
            raise

    return call


for _name in vars(DiskCalls):
    if not _name.startswith("_"):
        setattr(WatchedDisk, _name, _watched(_name))
