"""What a power cut may leave of a disk. A pure model of what is volatile: the content of files, and names in folders.

The POSIX it models is the pessimistic one: fsync of a file makes its content durable and not its name, fsync of a
folder its names and nothing of the files. What isn't durable survives in any part and any order; writes tear at 512
bytes, a file may have its new size without its new bytes. Only two things are certain: a rename within a folder is one
step, and one between two folders never loses the file.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import xxhash

ROOT: Final = 0
"""The folder that holds everything; it is there whatever happens."""
SECTOR_BYTES: Final = 512

Survival = Literal["lost", "kept", "subset", "torn"]
"""What becomes of what isn't durable: nothing is left, all is, a random part, or a random part with torn writes."""


class Op(NamedTuple):
    """A call that went through the seam to the disk. Names of folders and files are relative to their folder, a node.

    `site` is where it was called, as file:function. For a rename `name` is taken from `folder`, and `child` comes to be
    `to_name` in `to_folder`.
    """

    call: str
    site: str
    node: int = ROOT  # a file; of fsync_dir the folder
    folder: int = ROOT
    name: str = ""
    to_folder: int = ROOT
    to_name: str = ""
    offset: int = 0
    size: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        where = self.name or f"node {self.node}"
        return f"{self.call} {where}{f' -> {self.to_name}' if self.to_name else ''} at {self.site}"


class Content:
    """A file's bytes; behind `data` it is a hole up to `size`."""

    __slots__ = ("_digest", "data", "size")

    def __init__(self, data: bytes = b"", size: int = 0) -> None:
        self.data = bytearray(data)
        self.size = size
        self._digest: bytes | None = None

    def copy(self) -> Content:
        return Content(bytes(self.data), self.size)

    @property
    def digest(self) -> bytes:
        if self._digest is None:
            end = len(self.data.rstrip(b"\0"))
            self._digest = xxhash.xxh3_128_digest(memoryview(self.data)[:end]) + self.size.to_bytes(
                8, "little"
            )
        return self._digest

    def apply(self, op: Op) -> None:
        self._digest = None
        match op.call:
            case "pwritev":
                self.write(op.offset, op.data)
            case "truncate":
                self.resize(op.size)
            case "deallocate":
                self.write(op.offset, bytes(max(0, min(op.size, self.size - op.offset))))

    def write(self, offset: int, data: bytes) -> None:
        self._digest = None
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.size = max(self.size, offset + len(data))

    def resize(self, size: int) -> None:
        self._digest = None
        del self.data[size:]
        self.size = size


@dataclass(slots=True)
class File:
    """Its durable content, and the calls since that may or may not have reached the disk."""

    durable: Content = field(default_factory=Content)
    current: Content = field(default_factory=Content)
    pending: list[Op] = field(default_factory=list)

    def copy(self) -> File:
        return File(self.durable.copy(), self.current.copy(), list(self.pending))

    def apply(self, op: Op) -> None:
        self.current.apply(op)
        self.pending.append(op)

    def fsync(self) -> None:
        self.durable = self.current.copy()
        self.pending.clear()

    def surviving(self, how: Survival, rng: random.Random) -> Content:
        if how == "lost" or not self.pending:
            return self.durable
        if how == "kept":
            return self.current
        content = self.durable.copy()
        share = rng.choice((0.15, 0.5, 0.85))
        for op in self.pending:
            if how == "torn" and op.call == "pwritev" and rng.random() < 0.5:
                _tear(content, op, rng)
            elif rng.random() < share:
                content.apply(op)
        return content


def _tear(content: Content, op: Op, rng: random.Random) -> None:
    """Some sectors of a write: up to one, from one on, or any."""
    end = op.offset + len(op.data)
    bounds = [
        op.offset,
        *range(op.offset // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES),
        end,
    ]
    pieces = list(itertools.pairwise(bounds))
    cut = rng.randrange(len(pieces) + 1)
    match rng.randrange(3):
        case 0:
            pieces = pieces[:cut]
        case 1:
            pieces = pieces[cut:]
        case _:
            pieces = [piece for piece in pieces if rng.random() < 0.5]
    for start, stop in pieces:
        content.write(start, op.data[start - op.offset : stop - op.offset])
    if end > content.size and rng.random() < 0.5:
        content.resize(end)  # the size is there, the bytes aren't


class Change(NamedTuple):
    """A step of a folder: `removes` a name, if it still names `child`, and `adds` one."""

    number: int
    child: int
    removes: str = ""
    adds: str = ""
    needs: int = 0  # number of the change in another folder that must hold too: a rename's other half

    def apply(self, names: dict[str, int]) -> None:
        if self.removes and names.get(self.removes) == self.child:
            del names[self.removes]
        if self.adds:
            names[self.adds] = self.child


@dataclass(slots=True)
class Folder:
    """Its durable names, and the changes since."""

    durable: dict[str, int] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def copy(self) -> Folder:
        return Folder(dict(self.durable), list(self.pending))

    def names(self, holding: set[int] | None = None) -> dict[str, int]:
        """The names once the changes in `holding` (None: all) have come to the disk."""
        names = dict(self.durable)
        for change in self.pending:
            if holding is None or change.number in holding:
                change.apply(names)
        return names


class Image(NamedTuple):
    """What lies on the disk after a power cut: folders, then files with their nodes; paths relative to the root."""

    folders: tuple[str, ...]
    files: tuple[tuple[str, int, Content], ...]

    @property
    def digest(self) -> bytes:
        seen = xxhash.xxh3_128()
        for path in self.folders:
            seen.update(path.encode() + b"/\n")
        for path, _, content in self.files:
            seen.update(path.encode() + b"\n" + content.digest)
        return bytes(seen.digest())

    @property
    def nodes(self) -> dict[str, int]:
        return {path: node for path, node, _ in self.files}


class Disk:
    """The disk as the calls so far have left it, in memory and for good."""

    def __init__(self) -> None:
        self.folders: dict[int, Folder] = {ROOT: Folder()}
        self.files: dict[int, File] = {}
        self._changes = 0

    def copy(self) -> Disk:
        twin = Disk()
        twin.folders = {node: folder.copy() for node, folder in self.folders.items()}
        twin.files = {node: file.copy() for node, file in self.files.items()}
        twin._changes = self._changes
        return twin

    @property
    def last_node(self) -> int:
        return max(*self.folders, *self.files, ROOT)

    @property
    def is_durable(self) -> bool:
        """Whether nothing that was done is volatile any more."""
        return not any(node.pending for nodes in (self.folders, self.files) for node in nodes.values())

    def apply(self, op: Op) -> bool:
        """Whether anything changed, in memory or for good."""
        match op.call:
            case "make_dir":
                self.folders[op.node] = Folder()
                self._change(op.folder, op.node, adds=op.name)
            case "create":
                self.files[op.node] = File()
                self._change(op.folder, op.node, adds=op.name)
            case "unlink" | "remove_dir":
                self._change(op.folder, op.node, removes=op.name)
            case "rename":
                self._rename(op)
            case "fsync":
                if not self.files[op.node].pending:
                    return False
                self.files[op.node].fsync()
            case "fsync_dir":
                return self._fsync_dir(op.node)
            case "pwritev" | "truncate" | "deallocate":
                self.files[op.node].apply(op)
            case _:
                return False
        return True

    def _change(self, folder: int, child: int, *, removes: str = "", adds: str = "", needs: int = 0) -> int:
        self._changes += 1
        self.folders[folder].pending.append(Change(self._changes, child, removes, adds, needs))
        return self._changes

    def _rename(self, op: Op) -> None:
        if op.folder == op.to_folder:
            self._change(op.folder, op.node, removes=op.name, adds=op.to_name)
        else:
            added = self._change(op.to_folder, op.node, adds=op.to_name)
            self._change(op.folder, op.node, removes=op.name, needs=added)

    def _fsync_dir(self, node: int) -> bool:
        folder = self.folders[node]
        if not folder.pending:
            return False
        needed = {change.needs for change in folder.pending if change.needs}
        folder.durable = folder.names()
        folder.pending.clear()
        for other in self.folders.values():
            for change in [c for c in other.pending if c.number in needed]:
                change.apply(other.durable)
                other.pending.remove(change)
        return True

    def image(self, names: Survival, data: Survival, rng: random.Random) -> Image:
        """One of the states in which the disk may be found after a power cut now."""
        holding = self._holding(names, rng)
        folders: list[str] = []
        files: list[tuple[str, int, Content]] = []
        contents: dict[int, Content] = {}
        waiting = [("", ROOT)]
        while waiting:
            path, node = waiting.pop()
            for name, child in sorted(self.folders[node].names(holding).items()):
                if child in self.folders:
                    folders.append(path + name)
                    waiting.append((f"{path}{name}/", child))
                    continue
                if child not in contents:
                    contents[child] = self.files[child].surviving(data, rng)
                files.append((path + name, child, contents[child]))
        return Image(tuple(folders), tuple(files))

    def _holding(self, how: Survival, rng: random.Random) -> set[int] | None:
        if how == "kept":
            return None
        if how == "lost":
            return set()
        share = rng.choice((0.15, 0.5, 0.85))
        pending = [change for folder in self.folders.values() for change in folder.pending]
        holding = {change.number for change in pending if rng.random() < share}
        return holding | {change.needs for change in pending if change.number in holding and change.needs}

    @classmethod
    def of(cls, image: Image) -> Disk:
        """A disk on which nothing is volatile, with what a power cut has left."""
        disk = cls()
        node = max((node for _, node, _ in image.files), default=ROOT) + 1
        at = {"": ROOT}
        for path in sorted(image.folders):
            parent, _, name = path.rpartition("/")
            disk.folders[node] = Folder()
            disk.folders[at[parent]].durable[name] = at[path] = node
            node += 1
        for path, file, content in image.files:
            parent, _, name = path.rpartition("/")
            disk.folders[at[parent]].durable[name] = file
            disk.files.setdefault(file, File(content.copy(), content.copy()))
        return disk
