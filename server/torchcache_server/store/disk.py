"""The seam to the disk: every system call of the store that can lose, tear or refuse bytes.

Production and tests run the same store over it; a test overrides one method to see what happens when that call fails.
LMDB is the exception, and holds nothing that can't be rebuilt from what went through here. All methods raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import pyarrow as pa

from torchcache.mappings import Mapping, populate
from torchcache_server.store import anchors

Bytes = bytes | bytearray | memoryview

UNREADABLE: Final = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA)
"""What a disk or file system says of single places it can't read."""

_IOV_MAX: Final = 1024  # Linux; os.sysconf("SC_IOV_MAX") says the same everywhere it runs

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01


class DiskCalls:
    """The real calls. Descriptors are plain ints; paths are absolute, and go through no symlink below a held folder."""

    def make_dir(self, path: str) -> None:
        """Creates one folder, for the owner alone. One that exists is fine."""
        with suppress(FileExistsError), anchors.parent(path) as (folder, name):
            os.mkdir(name, 0o700, dir_fd=folder)

    def create(self, path: str) -> int:
        """Opens a new file for reading and writing; one of that name, or a symlink, is refused."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with anchors.parent(path) as (folder, name):
            return os.open(name, flags, 0o600, dir_fd=folder)

    def open(self, path: str) -> int:
        """Opens an existing file for reading and writing; symlinks are refused."""
        with anchors.parent(path) as (folder, name):
            return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        """Sets the file's size; growing leaves a hole that reads as zeros and takes no room."""
        os.ftruncate(fd, size)

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """One call; may write less than all, as the kernel does. At most `IOV_MAX` buffers."""
        return os.pwritev(fd, buffers, offset)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """One call; may read less."""
        return os.pread(fd, size, offset)

    def deallocate(self, fd: int, offset: int, size: int) -> None:
        """Gives the room of `size` bytes at `offset` back: they read as zeros then. The file's size stays."""
        while _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, size) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def map(self, fd: int, size: int, released: Callable[[], object] | None = None) -> pa.Buffer:
        """The file's first `size` bytes, mapped read-only and shared. Outlives `fd` and the file's name.

        `released` is called once the last view is gone, in any thread and at any point: it may take no lock.
        """
        mapping = Mapping(fd, size, released)
        return pa.foreign_buffer(mapping.address, size, base=mapping)

    def populate(self, buffer: pa.Buffer, offset: int, size: int) -> None:
        """Brings `size` bytes at `offset` of a mapping into memory, other threads running meanwhile.

        Raises OSError with EIO for what the disk can't read: touching such a page would end the process by SIGBUS.
        """
        populate(buffer.address + offset, size)

    def lock_alone(self, fd: int) -> bool:
        """Whether no reader of another process holds the file; if so it is ours alone until `unlock`."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, fd: int) -> None:
        """Lets readers hold the file again."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def free_bytes(self, path: str) -> tuple[int, int]:
        """What the file system that holds `path` has left for us, and its size. Takes no descriptor."""
        found = os.statvfs(anchors.held(path))
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def taken_bytes(self, path: str) -> int:
        """What the files of a folder take of the disk; those in folders below it don't count."""
        with anchors.opened(path) as fd, os.scandir(fd) as found:
            return sum(512 * f.stat(follow_symlinks=False).st_blocks for f in found if f.is_file())

    def next_data(self, fd: int, offset: int) -> int | None:
        """First byte at or behind `offset` that is not in a hole; None if there is none."""
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole, or the end, follows
                return None
            raise

    def next_hole(self, fd: int, offset: int) -> int:
        """First byte at or behind `offset` that is in a hole; the end of the file counts as one."""
        return os.lseek(fd, offset, os.SEEK_HOLE)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_dir(self, path: str) -> None:
        """Makes the names in a folder durable."""
        with anchors.opened(path) as fd:
            os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        """Atomically puts `source` in the place of `target`."""
        with anchors.parent(source) as (source_folder, old), anchors.parent(target) as (target_folder, new):
            os.rename(old, new, src_dir_fd=source_folder, dst_dir_fd=target_folder)

    def unlink(self, path: str) -> None:
        """Removes a name; one that is gone is fine."""
        with suppress(FileNotFoundError), anchors.parent(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_dir(self, path: str) -> None:
        """Removes an empty folder; one that is gone, or isn't empty, is left alone."""
        try:
            with suppress(FileNotFoundError), anchors.parent(path) as (folder, name):
                os.rmdir(name, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # a new segment came in between
                raise

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted; none for one that doesn't exist."""
        try:
            with anchors.opened(path) as fd:
                return sorted(os.listdir(fd))
        except FileNotFoundError:
            return []


OS: Final = DiskCalls()
"""The disk of production."""


def write_all(disk: DiskCalls, fd: int, buffers: Sequence[Bytes], offset: int) -> None:
    """Writes `buffers` one behind the other from `offset`, in order, going on after short writes."""
    for first in range(0, len(buffers), _IOV_MAX):
        rest = list(buffers[first : first + _IOV_MAX])
        left = sum(memoryview(b).nbytes for b in rest)
        while left:
            written = disk.pwritev(fd, rest, offset)
            if not written:
                raise OSError(errno.EIO, "the disk took nothing, and said nothing")
            offset += written
            left -= written
            while left and written >= memoryview(rest[0]).nbytes:
                written -= memoryview(rest[0]).nbytes
                del rest[0]
            if left and written:
                rest[0] = memoryview(rest[0])[written:]


def read_file(disk: DiskCalls, path: str) -> bytes:
    """All bytes of a small file."""
    fd = disk.open(path)
    try:
        size, parts, at = disk.size(fd), [], 0
        while at < size and (part := disk.pread(fd, size - at, at)):
            parts.append(part)
            at += len(part)
        return b"".join(parts)
    finally:
        disk.close(fd)


def replace_file(disk: DiskCalls, folder: str, name: str, data: Sequence[Bytes]) -> None:
    """Puts a small file in place, whole or not at all, and durable on return: write, fsync, rename, fsync folder.

    Not for two threads at a time with the same `name`. When a call fails the old file, if any, stays.
    """
    temporary = os.path.join(folder, f"{name}.tmp")
    disk.unlink(temporary)
    fd = disk.create(temporary)
    try:
        try:
            write_all(disk, fd, data, 0)
            disk.fsync(fd)
        finally:
            disk.close(fd)
        disk.rename(temporary, os.path.join(folder, name))
    except OSError:
        disk.unlink(temporary)
        raise
    disk.fsync_dir(folder)
