"""What an inspection of a store found. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "format",  # another version wrote the store
    "identity",  # one of the files that say whose it is
    "lost-identity",  # both of them
    "odd",  # a symlink, FIFO or the like where the store makes a file or folder
    "mode",  # readable for others than its owner, or not his
    "temporary",  # left by a write that was cut short
    "stray",  # not the store's
    "set-aside",  # a record that an earlier repair put into `damaged`
    "lost-ledger",  # a folder of records
    "record-copy",  # one copy of a record
    "flag",  # a flag: what is kept, and the policies
    "record",  # another record
    "header",  # of a segment
    "cut",  # a segment's file without its end
    "unreadable",  # parts of a segment, says the disk
    "payload",  # of a chunk
    "torn",  # a chunk whose write was cut short
    "index",
    "kept-nothing",  # a namespace that must be kept, and isn't there
    "uncommitted",  # bytes of a save that no record speaks of
    "save",  # a checkpoint that isn't whole
    "save-record",  # a record of a save that this version can't read
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that isn't as a server leaves it.

    `repair` says what a repair does; empty if there is nothing it could do. Without `is_damage` it is only a remark:
    the next start sees to it by itself, or a person is to know. `offset`, `namespace`, `chunk` (identity, index): what
    the finding is about, where `path` doesn't tell.
    """

    kind: Kind
    path: str
    what: str
    consequence: str
    repair: str = ""
    is_damage: bool = True
    offset: int = 0
    namespace: str = ""
    chunk: tuple[bytes, int] | None = None
