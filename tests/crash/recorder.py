"""A disk that works, and writes down what was done to it: calls of the seam, and what was promised meanwhile."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from torchcache_server.store.disk import Bytes, DiskCalls

from tests.crash.promises import Promise
from tests.crash.volatile import ROOT, Disk, Op

_PACKAGE: Final = f"{os.sep}torchcache_server{os.sep}"
_SEAM: Final = os.path.join("store", "disk.py")
_PASSES_ON: Final = (_SEAM, os.path.join("store", "health.py"))

Item = Op | Promise


class Recorder(DiskCalls):
    """Calls the real disk below folder `root` and keeps the `trace`. A call that raises is none.

    `disk` is what lies there already. `before_create` is told every file's path and node before it is made.
    """

    def __init__(self, root: str, disk: Disk, before_create: Callable[[str, int], None]) -> None:
        self.trace: list[Item] = []
        self._root = root
        self._before_create = before_create
        self._lock = threading.RLock()
        self._nodes: dict[str, int] = {"": ROOT}
        self._fds: dict[int, int] = {}
        self._last = disk.last_node
        waiting = [("", ROOT)]
        while waiting:
            path, node = waiting.pop()
            for name, child in disk.folders[node].names().items():
                self._nodes[path + name] = child
                if child in disk.folders:
                    waiting.append((f"{path}{name}/", child))

    def promise(self, promise: Promise) -> None:
        with self._lock:
            self.trace.append(promise)

    def make_dir(self, path: str) -> None:
        with self._lock:
            super().make_dir(path)
            if self._relative(path) not in self._nodes:
                self._note("make_dir", self._new(path), path)

    def create(self, path: str) -> int:
        with self._lock:
            self._before_create(path, self._last + 1)
            fd = super().create(path)
            self._fds[fd] = node = self._new(path)
            self._note("create", node, path)
            return fd

    def open(self, path: str) -> int:
        with self._lock:
            fd = super().open(path)
            node = self._nodes.get(self._relative(path))
            if node is not None:  # else it is the index, whose checksum is taken through the seam
                self._fds[fd] = node
                self._note("open", node, path)
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            node = self._fds.pop(fd, None)
            super().close(fd)
            if node is not None:
                self._note("close", node)

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            super().truncate(fd, size)
            self._note("truncate", self._fds[fd], size=size)

    def deallocate(self, fd: int, offset: int, size: int) -> None:
        with self._lock:
            super().deallocate(fd, offset, size)
            self._note("deallocate", self._fds[fd], offset=offset, size=size)

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        with self._lock:
            written = super().pwritev(fd, buffers, offset)
            data = b"".join(bytes(buffer) for buffer in buffers)[:written]
            self._note("pwritev", self._fds[fd], offset=offset, data=data)
            return written

    def fsync(self, fd: int) -> None:
        with self._lock:
            super().fsync(fd)
            self._note("fsync", self._fds[fd])

    def fsync_dir(self, path: str) -> None:
        with self._lock:
            super().fsync_dir(path)
            node = self._nodes.get(self._relative(path))
            if node is not None:  # else it lies above the root, whose names are durable
                self._note("fsync_dir", node)

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            super().rename(source, target)
            node = self._nodes.pop(self._relative(source))
            self._nodes[self._relative(target)] = node
            folder, name = self._place(source)
            to_folder, to_name = self._place(target)
            self._append(Op("rename", _site(), node, folder, name, to_folder, to_name))

    def unlink(self, path: str) -> None:
        self._removing("unlink", path, super().unlink)

    def remove_dir(self, path: str) -> None:
        self._removing("remove_dir", path, super().remove_dir)

    def _removing(self, call: str, path: str, remove: Callable[[str], None]) -> None:
        with self._lock:
            there = os.path.lexists(path)
            remove(path)
            if there and not os.path.lexists(path):
                self._note(call, self._nodes.pop(self._relative(path)), path)

    def _note(
        self, call: str, node: int, path: str = "", *, offset: int = 0, size: int = 0, data: bytes = b""
    ) -> None:
        folder, name = self._place(path) if path else (ROOT, "")
        self._append(Op(call, _site(), node, folder, name, offset=offset, size=size, data=data))

    def _append(self, op: Op) -> None:
        self.trace.append(op)

    def _new(self, path: str) -> int:
        self._last += 1
        self._nodes[self._relative(path)] = self._last
        return self._last

    def _relative(self, path: str) -> str:
        relative = os.path.relpath(path, self._root)
        return "" if relative == "." else relative

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = self._relative(path).rpartition("/")
        return self._nodes[folder], name


def _site() -> str:
    """Where in the server the call comes from, as file:function; of a shared function of the seam also who asked it."""
    frame: FrameType | None = sys._getframe(1)
    within = ""
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if _PACKAGE in path:
            site = f"{path.rpartition(_PACKAGE)[2]}:{function}"
            if not path.endswith(_PASSES_ON):
                return f"{within}{site}"
            if function == "replace_file":
                within = f"{site} for "
        frame = frame.f_back
    return "the test"
