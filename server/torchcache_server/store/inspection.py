"""What a store holds, checked byte by byte while no server has it. Changes nothing: `mending` does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import lmdb

from torchcache.records import SUFFIX, SegmentHeader, record_key
from torchcache_server.store import layout
from torchcache_server.store.disk import UNREADABLE, DiskCalls
from torchcache_server.store.findings import Finding
from torchcache_server.store.folder import index_trust
from torchcache_server.store.index import IndexReader
from torchcache_server.store.segment_scan import Found, SegmentBytes, identity_text
from torchcache_server.store.segments import read_header, remade_header

_REBUILT: Final = "thrown away: the next start makes it anew from the segments"

IsKept = Callable[[str], bool]
"""Whether the namespace of a folder, by the folder's name, must not be lost."""


@dataclass
class Contents:
    """What the segments hold. `held`: of the objects that were asked for, by identity, the chunks that are intact."""

    findings: list[Finding] = field(default_factory=list)
    namespaces: dict[str, str] = field(default_factory=dict)  # name of the folder -> namespace
    held: dict[bytes, dict[int, int]] = field(default_factory=dict)  # chunk index -> the whole object's bytes
    segments: int = 0
    records: int = 0
    bytes: int = 0


def inspect_segments(
    disk: DiskCalls,
    root: str,
    *,
    is_kept: IsKept,
    namespaces: Mapping[str, str],
    wanted: set[bytes],
    advance: Callable[[int], None],
) -> Contents:
    """Reads all segments, and the index if it is to be trusted. `advance` gets the bytes of each step.

    `namespaces` are those that are known from elsewhere, by their folders; `wanted` the identities of objects that
    `held` is to tell of. Raises OSError.
    """
    contents = Contents(held={identity: {} for identity in wanted})
    index, remark = _open_index(disk, root)
    if remark is not None:
        contents.findings.append(remark)
    try:
        inspection = _Inspection(
            disk, contents, is_kept=is_kept, known=namespaces, index=index, advance=advance
        )
        for path in segment_files(root):
            inspection.segment(path)
        contents.findings += inspection.conclusions(root)
    except lmdb.Error as error:
        contents.findings.append(_bad_index(root, f"it can't be read: {error}"))
    finally:
        if index is not None:
            index.close()
    return contents


def segment_files(root: str) -> list[str]:
    """Paths of the segments' files; what is no file is left out."""
    folder = os.path.join(root, layout.SEGMENTS)
    if layout.kind_of(folder) != "a folder":
        return []
    found = []
    for inner in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if inner.is_dir(follow_symlinks=False):
            files = [file for file in os.scandir(inner) if file.name.endswith(SUFFIX)]
            found += sorted(file.path for file in files if file.is_file(follow_symlinks=False))
    return found


def _open_index(disk: DiskCalls, root: str) -> tuple[IndexReader | None, Finding | None]:
    """The index, if the next start would trust it; else what there is to say of that."""
    path = os.path.join(root, layout.INDEX)
    is_trusted, why_not = index_trust(disk, root)
    if is_trusted:
        try:
            return IndexReader(path), None
        except lmdb.Error as error:
            why_not = f"it can't be read: {error}"
    if why_not:
        return None, _bad_index(root, why_not)
    return None, Finding(
        kind="index",
        path=path,
        what="the last server was killed, or a repair threw the index away",
        consequence="the next start makes it anew from the segments",
        is_damage=False,
    )


def _bad_index(root: str, what: str) -> Finding:
    return Finding(
        kind="index",
        path=os.path.join(root, layout.INDEX),
        what=what,
        consequence="the next start makes it anew from the segments, which takes longer",
        repair=_REBUILT,
    )


class _Inspection:
    """One walk through the segments."""

    def __init__(
        self,
        disk: DiskCalls,
        contents: Contents,
        *,
        is_kept: IsKept,
        known: Mapping[str, str],
        index: IndexReader | None,
        advance: Callable[[int], None],
    ) -> None:
        self._disk = disk
        self._is_kept = is_kept
        self._contents = contents
        self._index = index
        self._advance = advance
        self._numbers: set[int] = set()
        self._disagreements: Counter[str] = Counter()
        self._known = known

    def segment(self, path: str) -> None:
        """Checks one file, and notes what is in it."""
        fd = self._disk.open(path)
        try:
            try:
                header = read_header(self._disk, fd, path) or self._remade(fd, path)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                self._contents.findings.append(_unreadable(path, f"the disk can't read its header: {error}"))
                return
            if header is None:
                self._contents.findings.append(_headless(path, is_kept=self._is_kept(_folder(path))))
                return
            self._contents.segments += 1
            self._contents.namespaces[_folder(path)] = header.namespace
            self._numbers.add(header.number)
            before = self._contents.bytes
            scan = SegmentBytes(self._disk, fd, header, advance=self._read)
        finally:
            self._disk.close(fd)
        members = self._index.members(header.number) if self._index is not None else {}
        if scan.size < header.file_bytes:
            self._contents.findings.append(_cut(path, scan.size, header))
        if scan.unreadable:
            what = f"the disk can't read {scan.unreadable:,} of {self._contents.bytes - before:,} bytes"
            self._contents.findings.append(_unreadable(path, what, header.namespace))
        for found in scan.records():
            self._record(path, header, found, members.pop(found.offset, None))
        if members:
            self._disagreements["entries that lead to no record"] += len(members)

    def conclusions(self, root: str) -> Iterator[Finding]:
        """What the index says that the segments don't bear out, once all were seen."""
        if self._index is None:
            return
        for number in self._index.segments():
            if number not in self._numbers:
                self._disagreements["segments that aren't there"] += 1
        if self._disagreements:
            what = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self._disagreements.items()))
            yield _bad_index(root, f"the segments don't bear it out: {what}")

    def _read(self, count: int) -> None:
        self._contents.bytes += count
        self._advance(count)

    def _record(self, path: str, header: SegmentHeader, found: Found, indexed: bytes | None) -> None:
        contents, record = self._contents, found.header
        key = record_key(record.identity, record.chunk_index)
        if found.is_intact:
            contents.records += 1
            if record.identity in contents.held:
                contents.held[record.identity][record.chunk_index] = record.object_size
        if self._index is not None and indexed != key:
            if indexed is not None:
                self._disagreements["entries that lead to another chunk"] += 1
            elif found.is_intact and self._index.place(key) is None:
                self._disagreements["records that it doesn't know"] += 1
        if not found.is_intact:
            contents.findings.append(self._bad_record(path, header, found, is_indexed=indexed is not None))

    def _bad_record(self, path: str, header: SegmentHeader, found: Found, *, is_indexed: bool) -> Finding:
        record = found.header
        chunk = f"chunk {record.chunk_index} of {identity_text(record.identity)}"
        kept = self._is_kept(_folder(path))
        # What a trusted index doesn't know nobody is given: the chunk is elsewhere, or was never acknowledged. Without
        # one the next start leaves out what is torn.
        is_dead = not is_indexed if self._index is not None else found.is_torn
        if is_dead:
            consequence = "nobody is given it"
        elif kept:
            consequence = f"{header.namespace} must be kept, and this may be its only copy"
        else:
            consequence = "it is fetched or computed again when it is next read"
        return Finding(
            kind="torn" if found.is_torn else "payload",
            path=path,
            what=f"{chunk} is " + ("cut short" if found.is_torn else "damaged") + f", at {found.offset}",
            consequence=consequence,
            repair="marked as dead" if not kept or (is_dead and self._index is not None) else "",
            is_damage=not is_dead,
            offset=found.offset,
            namespace=header.namespace,
            chunk=(record.identity, record.chunk_index),
        )

    def _remade(self, fd: int, path: str) -> SegmentHeader | None:
        """The header of a segment that must be kept, as far as it can be told without the damaged one."""
        folder = _folder(path)
        if folder not in self._known or not self._is_kept(folder):
            return None
        header = remade_header(self._disk, fd, path, self._known[folder])
        if header is not None:
            self._contents.findings.append(
                Finding(
                    kind="header",
                    path=path,
                    what="the header of the segment is damaged",
                    consequence="its namespace must be kept: the next start makes the header again",
                    repair="made again from the file's name",
                    namespace=header.namespace,
                )
            )
        return header


def _folder(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _headless(path: str, *, is_kept: bool) -> Finding:
    return Finding(
        kind="header",
        path=path,
        what="the header of the segment is damaged" + (", and whose it is isn't known" if is_kept else ""),
        consequence="it may have to be kept, and stays as it is"
        if is_kept
        else "the next start removes it; its chunks are fetched or computed again",
        repair="" if is_kept else "removed",
    )


def _unreadable(path: str, what: str, namespace: str = "") -> Finding:
    return Finding(
        kind="unreadable",
        path=path,
        what=what,
        consequence="the chunks there are lost; see to the disk",
        namespace=namespace,
    )


def _cut(path: str, size: int, header: SegmentHeader) -> Finding:
    return Finding(
        kind="cut",
        path=path,
        what=f"the file has {size:,} bytes, not {header.file_bytes:,}",
        consequence="the chunks of its end are gone; the next start gives it its length back",
        is_damage=False,
        namespace=header.namespace,
    )
