"""What the tests of the store share: chunks with telling payloads, crash images, and a disk that fails on demand."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.store import DiskCalls, Store, space

from torchcache.model import ChunkId, ObjectId

MIB = 1024 * 1024
CAPACITY = 64 * MIB  # segments of 8 MiB: many, and each holds at least one full record
SMALL_SEGMENT = 64 * 1024  # what `small_store` allows; chunks must be small too, then


def chunk(number: int, *, version: str = "v1", index: int = 0) -> ChunkId:
    return ChunkId(ObjectId("s3", f"bucket/key-{number}", version), index)


def payload(number: int, size: int = 1000) -> bytes:
    """Bytes that no other number has."""
    return _small_payload(number, size) if size < SMALL_SEGMENT else random.Random(number).randbytes(size)


@lru_cache(maxsize=512)
def _small_payload(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def fill(store: Store, namespace: str, numbers: range, size: int = 1000) -> None:
    store.put_many(namespace, [(chunk(n), size, payload(n, size)) for n in numbers])


def held(store: Store, number: int, size: int = 1000) -> bool:
    """Whether the store has chunk `number`; wrong bytes that pass for good ones fail the test."""
    found = store.lookup(chunk(number))
    if found is None:
        return False
    if not found.is_intact():
        return False
    assert bytes(found.payload) == payload(number, size)
    return True


@contextmanager
def small_store() -> Iterator[Path]:
    """A folder for stores with segments of `SMALL_SEGMENT` bytes, in memory where there is room: quick to fill."""
    memory = (
        "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 64 * MIB else None
    )
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as folder:
        patch.setattr(space, "MIN_SEGMENT_BYTES", SMALL_SEGMENT)
        yield Path(folder)


def descriptors(within: Path | None = None) -> int:
    """How many files this process has open, in all or within a folder: others may come and go by other threads."""
    if within is None:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found += str(descriptor.readlink()).startswith(f"{within}/")
    return found


def crash_image(store_path: Path, target: Path) -> Path:
    """The folder as a killed process would leave it: all that was written, and no word of a clean stop."""
    shutil.copytree(store_path, target)
    return target


def segment_files(store_path: Path) -> list[Path]:
    return sorted((store_path / "segments").glob("*/*.segment"), key=lambda p: p.name)


def find_payload(path: Path, content: bytes) -> int:
    """Offset of `content` in a file."""
    at = path.read_bytes().find(content)
    assert at >= 0
    return at


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    byte = path.read_bytes()[offset]
    overwrite(path, offset, bytes([byte ^ 1 << bit]))


class FailingDisk(DiskCalls):
    """The real disk, until told that a call fails. Counts calls by name."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self._rules: dict[str, Callable[[tuple[Any, ...]], Exception | None]] = {}

    def fail(self, call: str, code: int, *, times: int = 1 << 30, path_has: str = "") -> None:
        """From now on, `times` calls of `call` raise OSError with `code`, if their path or file contains `path_has`."""
        left = [times]

        def rule(arguments: tuple[Any, ...]) -> Exception | None:
            if path_has and path_has not in name_of(arguments[0]):
                return None
            if not left[0]:
                return None
            left[0] -= 1
            return OSError(code, os.strerror(code))

        self._rules[call] = rule

    def mend(self) -> None:
        self._rules.clear()

    def _called(self, call: str, *arguments: Any) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        rule = self._rules.get(call)
        if rule is not None and (error := rule(arguments)) is not None:
            raise error


def name_of(argument: Any) -> str:
    return argument if isinstance(argument, str) else str(Path(f"/proc/self/fd/{argument}").readlink())


SEAM = tuple(name for name in vars(DiskCalls) if not name.startswith("_"))
"""Every call of the seam, those that are still to be added too."""


def _failing(name: str) -> Callable[..., Any]:
    real = getattr(DiskCalls, name)

    def call(self: FailingDisk, *arguments: Any, **more: Any) -> Any:
        try:
            self._called(name, *arguments)
        except OSError:
            if name == "close":
                real(self, *arguments)  # as Linux does: the descriptor is gone either way
            raise
        return real(self, *arguments, **more)

    return call


for _name in SEAM:
    setattr(FailingDisk, _name, _failing(_name))


class ShortWrites(DiskCalls):
    """Writes at most 1000 bytes a call, as the kernel may."""

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        return os.pwrite(fd, b"".join(bytes(b) for b in buffers)[:1000], offset)


class FullDisk(DiskCalls):
    """A disk of `size` bytes, of which unlinked segments give theirs back: real ENOSPC, without root's tmpfs."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        wanted = sum(memoryview(b).nbytes for b in buffers)
        path = name_of(fd)
        with self._lock:
            if wanted > self._left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._left -= wanted
            self._held[path] = self._held.get(path, 0) + wanted
        return super().pwritev(fd, buffers, offset)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        with self._lock:
            self._left += self._held.pop(path, 0)
