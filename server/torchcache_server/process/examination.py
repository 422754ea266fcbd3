"""Checking a store while no server has it, checkpoints included, and repairing it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError
from torchcache.locks import LockFile
from torchcache.model import SAVE_PREFIX
from torchcache.records import folder_name
from torchcache.save_names import KEPT_PREFIXES
from torchcache_server.cache.save_records import SAVE, decode_save
from torchcache_server.cache.saves import Save
from torchcache_server.store import OS
from torchcache_server.store.findings import Finding
from torchcache_server.store.folder import check_owner, take_lock
from torchcache_server.store.folder_inspection import Notes, inspect_folder
from torchcache_server.store.inspection import Contents, inspect_segments, segment_files
from torchcache_server.store.keeping import protecting_flags
from torchcache_server.store.layout import FLAGS, RECORDS, SEGMENTS
from torchcache_server.store.ledger import record_name
from torchcache_server.store.mending import Mender
from torchcache_server.store.reading_disk import ReadingDisk

_NO_LOCK: Final = (errno.ENOENT, errno.EROFS, errno.ELOOP, errno.EISDIR, errno.ENXIO)

Advance = Callable[[int], None]
"""Takes the bytes just read."""

Progress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
"""Shows how far a store is, given its folder and bytes, while the block runs."""


@dataclass
class Report:
    """What came of one store. `errors`: why a repair failed, by its finding."""

    store: str
    findings: list[Finding] = field(default_factory=list)
    repaired: set[Finding] = field(default_factory=set)
    errors: dict[Finding, str] = field(default_factory=dict)
    segments: int = 0
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    unusable: str = ""

    @property
    def left(self) -> list[Finding]:
        """Damage that is still there."""
        return [finding for finding in self.findings if finding.is_damage and finding not in self.repaired]


def examine(store: Path, *, repair: bool, progress: Progress) -> Report:
    """Checks one store; with `repair` also mends what can be. Without, nothing at all is written."""
    report = Report(str(store))
    began = time.monotonic()
    try:
        with _locked(store):
            _examine(report, repair=repair, progress=progress)
    except ConfigurationError as error:
        report.unusable = error.message
    except OSError as error:
        report.unusable = f"the store {store} can't be checked: {error}"
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keeps servers away. A store that can't be written to, or was never locked, is read as it is."""
    if not os.path.lexists(store):
        raise ConfigurationError(f"there is no store {store}")
    check_owner(str(store))
    lock: LockFile | None = None
    try:
        lock = take_lock(str(store), create=False)
    except OSError as error:
        if error.errno not in _NO_LOCK:
            raise
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _examine(report: Report, *, repair: bool, progress: Progress) -> None:
    root, disk = report.store, ReadingDisk()
    notes = inspect_folder(disk, root)
    report.findings += notes.findings
    if not notes.is_ours:
        return
    saves, unread = _saves(root, notes)
    report.findings += unread
    due = [save for save in saves if save.must_be_kept]
    wanted = {object.id.encoded for save in due for object in save.objects.values()}
    kept = {folder_name(name) for name, is_kept in notes.flags.items() if is_kept} | notes.doubtful_flags
    saved = set().union(*(save.namespaces for save in saves))
    namespaces = {folder_name(name): name for name in (*notes.flags, *saved)}
    files = segment_files(root)
    size = sum(Path(path).stat().st_blocks * 512 for path in files)
    with progress(root, size) as advance:
        contents = inspect_segments(
            disk,
            root,
            is_kept=lambda folder: FLAGS in notes.lost or folder in kept,
            namespaces=namespaces,
            wanted=wanted,
            advance=advance,
        )
    report.segments, report.records, report.bytes = contents.segments, contents.records, contents.bytes
    report.findings += [_settled(finding, contents) for finding in contents.findings]
    report.findings += [finding for save in due for finding in _missing(root, save, contents)]
    report.findings += _kept_nothing(root, notes, saved)
    if not notes.records_in_doubt and not unread:
        report.findings += _uncommitted(root, contents, saved)
    if repair:
        _repair(report, namespaces | contents.namespaces)


def _saves(root: str, notes: Notes) -> tuple[list[Save], list[Finding]]:
    """The saves that were committed to the store, and what there is to say of records that don't tell."""
    saves, findings = [], []
    for key, record in notes.records.items():
        if not key.startswith(SAVE):
            continue
        try:
            saves.append(decode_save(record))
        except ValueError as error:
            findings.append(
                Finding(
                    kind="save-record",
                    path=os.path.join(root, RECORDS, record_name(key)),
                    what=f"the record of a checkpoint isn't one that this version writes: {error}",
                    consequence="the checkpoint can't be read; nothing that it may need is dropped",
                )
            )
    return saves, findings


def _settled(finding: Finding, contents: Contents) -> Finding:
    """A damaged chunk of which another copy is good, is no loss."""
    if finding.chunk is None or not finding.is_damage:
        return finding
    identity, index = finding.chunk
    if index not in contents.held.get(identity, {}):
        return finding
    return replace(
        finding, consequence="another copy of it is good", repair="marked as dead", is_damage=False
    )


def _missing(root: str, save: Save, contents: Contents) -> Iterator[Finding]:
    """What keeps a checkpoint from being restored, or uploaded."""
    for name, object in save.objects.items():
        held = contents.held[object.id.encoded]
        lack = [
            index
            for index in range(object.chunk_count if object.size else 0)
            if held.get(index) != object.size
        ]
        if lack:
            yield Finding(
                kind="save",
                path=os.path.join(root, SEGMENTS, folder_name(save.namespace)),
                what=f"the checkpoint {save.key} (save {save.save_id}) isn't whole: of {name} "
                f"{len(lack):,} of {object.chunk_count:,} chunks are missing or damaged, the first is {lack[0]}",
                consequence="it can't be restored or uploaded from here: save it again",
                namespace=save.namespace,
            )


def _uncommitted(root: str, contents: Contents, saved: set[str]) -> Iterator[Finding]:
    for folder, name in contents.namespaces.items():
        if name.startswith(SAVE_PREFIX) and name not in saved:
            yield Finding(
                kind="uncommitted",
                path=os.path.join(root, SEGMENTS, folder),
                what=f"{name} is a save that no record speaks of: it was given up, or is uploaded and replaced",
                consequence="the next start drops it",
                is_damage=False,
                namespace=name,
            )


def _kept_nothing(root: str, notes: Notes, saved: set[str]) -> Iterator[Finding]:
    for name, is_kept in notes.flags.items():
        if is_kept and name not in saved and not Path(root, SEGMENTS, folder_name(name)).is_dir():
            yield Finding(
                kind="kept-nothing",
                path=os.path.join(root, FLAGS, record_name(name.encode())),
                what=f"{name} is to be kept, but there is nothing of it, nor of a checkpoint that needs it",
                consequence="none: a save that was begun and given up leaves it; the next start forgets it",
                is_damage=False,
                namespace=name,
            )


def _repair(report: Report, namespaces: dict[str, str]) -> None:
    def protecting(namespace: str) -> bytes:
        return protecting_flags(kept=namespace.startswith(KEPT_PREFIXES))

    mender = Mender(OS, report.store, namespaces=namespaces, protecting=protecting)
    for finding in report.findings:
        if not finding.repair:
            continue
        try:
            mender.mend(finding)
        except OSError as error:
            report.errors[finding] = str(error)
        else:
            report.repaired.add(finding)
    mender.finish()
