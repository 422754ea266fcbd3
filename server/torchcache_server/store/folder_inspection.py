"""What a store's folder says without its segments: names, modes, whose it is, what must be kept. Changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from torchcache.records import SUFFIX
from torchcache_server.store import layout
from torchcache_server.store.disk import DiskCalls
from torchcache_server.store.findings import Finding
from torchcache_server.store.identity import DAMAGED, FORMAT, NOTHING, read_identity
from torchcache_server.store.keeping import is_kept
from torchcache_server.store.ledger import RECORD_SUFFIX, TEMPORARY_SUFFIX, read_record

_AFTERWARDS: Final = "what it may speak of stays then, until you remove the folder 'damaged'"


@dataclass
class Notes:
    """What the store's small files say. `flags` and `records` hold those that can be read.

    `doubtful_flags`: folders of segments whose flag can't be read; they count as kept. `lost`: folders of records that
    are gone. `records_in_doubt`: a record can't be read, or was set aside.
    """

    findings: list[Finding] = field(default_factory=list)
    is_ours: bool = True  # of this format
    flags: dict[str, bool] = field(default_factory=dict)  # namespace -> whether it is kept
    records: dict[bytes, bytes] = field(default_factory=dict)
    doubtful_flags: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    records_in_doubt: bool = False


def inspect_folder(disk: DiskCalls, root: str) -> Notes:
    """Everything but the segments and the index. Raises OSError."""
    notes = Notes()
    odd = [_odd(path, what) for path, what in layout.oddities(root)]
    notes.findings += odd
    odd_paths = {finding.path for finding in odd}
    _inspect_identity(disk, root, notes, odd_paths)
    for name in layout.LEDGERS:
        if os.path.join(root, name) not in odd_paths:
            _inspect_ledger(disk, root, name, notes)
    _inspect_set_aside(root, notes, odd_paths)
    if os.lstat(root).st_mode & stat.S_IWOTH:
        notes.findings.append(_loose(root, 0o700))
    for path, is_folder in _walk(root, odd_paths):
        notes.findings += _inspect_mode(path, is_folder=is_folder)
        if not is_folder:
            notes.findings += _inspect_name(root, path)
    return notes


def _odd(path: str, what: str) -> Finding:
    return Finding(
        kind="odd",
        path=path,
        what=f"{what}; no server made it",
        consequence="no server starts on this store until you have removed it",
    )


def _inspect_identity(disk: DiskCalls, root: str, notes: Notes, odd: set[str]) -> None:
    if odd & {os.path.join(root, name) for name in (layout.IDENTITY, layout.IDENTITY_COPY)}:
        return
    identity = read_identity(disk, root)
    path = os.path.join(root, layout.IDENTITY)
    if identity.found not in (FORMAT, DAMAGED, NOTHING):
        notes.is_ours = False
        notes.findings.append(
            Finding(
                kind="format",
                path=path,
                what=f"the store has the format {identity.found!r}, this version makes {FORMAT!r}",
                consequence="a start empties it, or is refused if it may hold a checkpoint that isn't uploaded",
            )
        )
    elif identity.server_id is None:
        notes.findings.append(
            Finding(
                kind="lost-identity",
                path=path,
                what=f"neither it nor {layout.IDENTITY_COPY} is sound: whose store this is isn't known any more",
                consequence="a start empties it, or is refused if it may hold a checkpoint that isn't uploaded: put one"
                " of the files back from a backup",
            )
        )
    else:
        for name in identity.unsound:
            notes.findings.append(
                Finding(
                    kind="identity",
                    path=os.path.join(root, name),
                    what="it is missing or damaged",
                    consequence="the other copy is the last that says whose store this is",
                    repair="written anew from the other copy",
                )
            )


def _inspect_ledger(disk: DiskCalls, root: str, name: str, notes: Notes) -> None:
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        if disk.names(os.path.join(root, layout.SEGMENTS)):
            notes.lost.add(name)
            notes.records_in_doubt = True
            notes.findings.append(_lost_ledger(folder))
        return
    for file in disk.names(folder):
        path = os.path.join(folder, file)
        if not file.endswith(RECORD_SUFFIX) or layout.kind_of(path) != "a file":
            continue
        reading = read_record(disk, path)
        if reading.key is None:
            notes.findings.append(_damaged_record(path, name))
            if name == layout.FLAGS:
                notes.doubtful_flags.add(file.removesuffix(RECORD_SUFFIX))
            else:
                notes.records_in_doubt = True
            continue
        if name == layout.FLAGS:
            notes.flags[reading.key.decode(errors="replace")] = is_kept(reading.value)
        else:
            notes.records[reading.key] = reading.value
        if reading.sound_copies < 2:
            notes.findings.append(
                Finding(
                    kind="record-copy",
                    path=path,
                    what="one of its two copies is damaged",
                    consequence="the other is the last that says what must be kept",
                    repair="written anew from the other copy",
                )
            )


def _lost_ledger(folder: str) -> Finding:
    return Finding(
        kind="lost-ledger",
        path=folder,
        what="the folder is gone, and with it the notes of what must be kept",
        consequence="no server starts on this store",
        repair=f"made anew, empty; {_AFTERWARDS}",
    )


def _damaged_record(path: str, ledger: str) -> Finding:
    is_flag = ledger == layout.FLAGS
    return Finding(
        kind="flag" if is_flag else "record",
        path=path,
        what="both copies are damaged: "
        + (
            "whether a namespace must be kept, and its policy"
            if is_flag
            else "a checkpoint, or how far its upload has come"
        )
        + ", isn't known any more",
        consequence="no server starts on this store",
        repair=f"set aside; {_AFTERWARDS}",
    )


def _inspect_set_aside(root: str, notes: Notes, odd: set[str]) -> None:
    folder = os.path.join(root, layout.DAMAGED)
    if folder in odd:
        return
    flags, records = layout.set_aside(root, layout.FLAGS), layout.set_aside(root, layout.RECORDS)
    notes.doubtful_flags.update(name.partition(".")[0] for name in flags)
    notes.records_in_doubt |= bool(records)
    if flags or records:
        notes.findings.append(
            Finding(
                kind="set-aside",
                path=folder,
                what=f"{len(flags) + len(records)} damaged records were set aside here",
                consequence="no save that they may speak of is dropped until you remove the folder",
                is_damage=False,
            )
        )


def _walk(root: str, odd: set[str]) -> Iterator[tuple[str, bool]]:
    """Files and folders of the store's, and whether each is a folder. What is odd is left out."""
    for name in layout.ROOT_FILES:
        if layout.kind_of(os.path.join(root, name)) == "a file":
            yield os.path.join(root, name), False
    for name in os.listdir(root):
        if name.endswith(TEMPORARY_SUFFIX) and name.removesuffix(TEMPORARY_SUFFIX) in layout.ROOT_FILES:
            yield os.path.join(root, name), False
    for name in (*layout.FOLDERS, layout.DAMAGED):
        top = os.path.join(root, name)
        if top in odd:
            continue
        for folder, _, files in os.walk(top):
            yield folder, True
            for file in files:
                path = os.path.join(folder, file)
                if path not in odd and not os.path.islink(path):
                    yield path, False


def _inspect_mode(path: str, *, is_folder: bool) -> Iterator[Finding]:
    status = os.lstat(path)
    if status.st_uid != os.geteuid():
        yield Finding(
            kind="mode",
            path=path,
            what=f"it belongs to user {status.st_uid}, not to {os.geteuid()}",
            consequence="a server of this user can't use it: chown it",
        )
    elif status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield _loose(path, 0o700 if is_folder else 0o600)


def _loose(path: str, wanted: int) -> Finding:
    return Finding(
        kind="mode",
        path=path,
        what=f"its mode is {stat.S_IMODE(os.lstat(path).st_mode):o}",
        consequence="other users may get at what is cached",
        repair=f"its mode is set to {wanted:o}",
    )


def _inspect_name(root: str, path: str) -> Iterator[Finding]:
    folder, name = os.path.split(path)
    top = os.path.relpath(folder, root).split(os.sep)[0]
    if name.endswith(TEMPORARY_SUFFIX):
        yield Finding(
            kind="temporary",
            path=path,
            what="a write that was cut short left it",
            consequence="it takes room until the next start",
            repair="removed",
            is_damage=False,
        )
    elif not _is_known(top, name):
        yield Finding(
            kind="stray",
            path=path,
            what="it isn't the store's",
            consequence="none for the store: see whether you need it",
            is_damage=False,
        )


def _is_known(top: str, name: str) -> bool:
    match top:
        case layout.SEGMENTS:
            return name.endswith(SUFFIX)
        case layout.FLAGS | layout.RECORDS:
            return name.endswith(RECORD_SUFFIX)
        case layout.INDEX:
            return name in layout.INDEX_FILES
    return True  # at the top only the store's own names are looked at; spares and what was set aside may be called so
