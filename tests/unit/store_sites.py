"""Where in the store the disk is called: a disk that knows its callers, and fails for one of them."""

from __future__ import annotations

import ast
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torchcache_server import store as store_package

from tests.unit.store_parts import SEAM, FailingDisk, name_of

_STORE = str(Path(store_package.__file__).parent) + os.sep
OFFLINE = ("mending.py", "inspection.py", "folder_inspection.py", "segment_scan.py")
"""The doctor's: no server runs them."""
_PAYLOAD_BYTES = 4096  # no header is so long
SHORT = 0
"""In the place of an errno: the call does less than it was asked, which is no error."""


class Site(NamedTuple):
    """One way to a call of the seam: the call, and all the store's lines that led there, the innermost first."""

    call: str
    lines: tuple[tuple[str, int, str], ...]  # file, line, function

    @property
    def place(self) -> tuple[str, str, int]:
        """The line that wants the call, the seam's own helpers aside."""
        file, line, _ = next((one for one in self.lines if one[0] != "disk.py"), self.lines[0])
        return self.call, file, line

    def __str__(self) -> str:
        return f"{self.call} < " + " < ".join(f"{file}:{line} {name}" for file, line, name in self.lines)


class Fault(NamedTuple):
    """Calls at `site` fail with `code`, once `after` of them have not: one, or all that follow."""

    site: Site
    code: int
    always: bool
    after: int = 0

    def __str__(self) -> str:
        kind = errno.errorcode.get(self.code, "SHORT")
        return f"{kind} {'always' if self.always else 'once'} after {self.after} at {self.site}"


class SiteDisk(FailingDisk):
    """The real disk, which notes the site of each call, and lets those of `faults` fail until mended."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        super().__init__()
        self.seen: dict[
            Site, list[int]
        ] = {}  # the sites in the order they came, and the phase of each coming
        self.phase = 0
        self.failed = 0
        self.sync_failed: list[str] = []  # files of which an fsync failed
        self.synced_again: list[str] = []  # and those of them that were synced again: F13
        self.during: Callable[[], object] | None = (
            None  # what another thread does while the next payload is written
        )
        self.free_now: int | None = None  # what the file system says that it has left
        self._faults = {fault.site: fault for fault in faults}
        self._unsure: set[tuple[int, int]] = set()

    def mend(self) -> None:
        """From here on everything works."""
        self._faults.clear()

    @contextmanager
    def healed(self) -> Iterator[None]:
        """Meanwhile everything works."""
        faults, self._faults = self._faults, {}
        yield
        self._faults = faults

    def restarted(self) -> None:
        """Another process: what it knows of failed calls is gone."""
        self._unsure.clear()
        self.sync_failed.clear()

    def _called(self, call: str, *arguments: Any) -> None:
        code = self._code(call)
        if call == "fsync" and _file(arguments[0]) in self._unsure:
            self.synced_again.append(name_of(arguments[0]))
        if code:
            if call == "fsync":
                self._unsure.add(_file(arguments[0]))
                self.sync_failed.append(name_of(arguments[0]))
            raise OSError(code, os.strerror(code))

    def _code(self, call: str, *, short: bool = False) -> int | None:
        """The fault that strikes now, if there is one."""
        site = _site(call)
        fault = self._faults.get(site)
        if short and (fault is None or fault.code != SHORT):
            return None
        phases = self.seen.setdefault(site, [])
        phases.append(self.phase)
        if fault is None or (fault.code == SHORT) != short or len(phases) <= fault.after:
            return None
        if not fault.always:
            del self._faults[site]
        self.failed += 1
        return fault.code

    def create(self, path: str) -> int:
        fd = super().create(path)
        self._unsure.discard(_file(fd))  # a new file in the inode of one that is gone
        return fd

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        if self.during is not None and max(map(len, buffers)) >= _PAYLOAD_BYTES:
            during, self.during = self.during, None
            during()
        if self._code("pwritev", short=True) is None:
            return super().pwritev(fd, buffers, offset)
        data = b"".join(buffers)
        return os.pwrite(fd, data[: 1 + len(data) // 2], offset)

    def free_bytes(self, path: str) -> tuple[int, int]:
        free, size = super().free_bytes(path)
        return (free if self.free_now is None else self.free_now), size

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return super().pread(fd, size if self._code("pread", short=True) is None else min(size, 7), offset)


def _file(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _site(call: str) -> Site:
    lines = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if file := _module(code.co_filename):
            lines.append((file, frame.f_lineno, code.co_name))
            if file == "store.py":  # the public face; who calls that is no matter
                break
        frame = frame.f_back
    return Site(call, tuple(lines))


@functools.cache
def _module(file: str) -> str:
    """Which of the store's modules it is; "" of another's, and of the one through which every call goes."""
    return file[len(_STORE) :] if file.startswith(_STORE) and not file.endswith("health.py") else ""


def written_sites() -> dict[tuple[str, str, str], list[range]]:
    """All calls of the seam in the store's sources, by file, call and function: the lines each of them stands on."""
    found: dict[tuple[str, str, str], list[range]] = {}
    for path in sorted(Path(_STORE).glob("*.py")):
        if path.name in OFFLINE:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and _is_disk(node.func)
                ):
                    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                    found.setdefault((path.name, node.func.attr, function.name), []).append(lines)
    return found


def _is_disk(called: ast.Attribute) -> bool:
    owner = called.value
    name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return called.attr in SEAM and name.lstrip("_") == "disk"
