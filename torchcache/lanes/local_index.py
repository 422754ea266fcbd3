"""A store's index, read by another process than the one that owns it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import lmdb

from torchcache.records import CHUNKS_TABLE, FILES_TABLE, INDEX, INDEX_FILES, MAX_READERS

_TABLES: Final = 4


class LocalIndex:
    """An open index. To be closed before a fork, and used by one thread at a time.

    It is registered as a reader: the owner keeps what a transaction sees until that has ended, or its process has. An
    index that is made anew is other files; `is_current` tells.
    """

    def __init__(self, store: str) -> None:
        """Raises lmdb.Error or OSError: it isn't there, isn't ours to open, or is open in this process already."""
        self._folder = os.path.join(store, INDEX)
        before = self._found()
        # A map as large as the owner's: the file may grow to that.
        self._env = lmdb.open(
            self._folder,
            map_size=0,
            max_dbs=_TABLES,
            max_readers=MAX_READERS,
            max_spare_txns=1,
            readonly=True,
            create=False,
            readahead=False,
        )
        try:
            self._chunks: Any = self._env.open_db(CHUNKS_TABLE, create=False)
            self._files: Any = self._env.open_db(FILES_TABLE, create=False)
            # While they are open no other file gets their numbers.
            self._files_open = self._found()
            if self._files_open != before:
                raise FileNotFoundError(f"the index {self._folder} was just made anew")
        except BaseException:
            self._env.close()
            raise

    def begin(self) -> Any:
        """A transaction, to be used in a `with`: its `get` says the place of a chunk by its key.

        Raises lmdb.Error; MapResizedError once the owner was started with room for a larger index.
        """
        return self._env.begin(self._chunks)

    def file(self, txn: Any, number: bytes) -> bytes | None:
        """What a transaction says of the file of a segment, by its packed number."""
        found: bytes | None = txn.get(number, db=self._files)
        return found

    def is_current(self) -> bool:
        """Whether the files at its place are the ones that are open."""
        try:
            return self._found() == self._files_open
        except OSError:
            return False

    def readers(self) -> str:
        """LMDB's table of who reads, for people: process, thread, transaction."""
        found: str = self._env.readers()
        return found

    def close(self) -> None:
        """Gives the reader's slot back."""
        self._env.close()

    def _found(self) -> list[tuple[int, int]]:
        """Device and inode of its files. Raises OSError."""
        found = [Path(self._folder, name).stat() for name in INDEX_FILES]
        return [(file.st_dev, file.st_ino) for file in found]
