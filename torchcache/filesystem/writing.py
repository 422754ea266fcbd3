"""Objects opened for writing: spooled to a temporary file, published whole on close, or not at all."""

from __future__ import annotations

import contextlib
import io
import mmap
import tempfile
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

SPOOL_MEMORY_BYTES = 8 * 1024 * 1024
"""A file stays in memory up to this size, and goes to a temporary file beyond."""


class SpoolFile(io.BufferedIOBase):
    """A file that becomes an object when it is closed.

    Nothing is visible before `close`; leaving a `with` block by an exception discards the file, and so does losing
    it without closing it. With `autocommit=False` (fsspec's transactions) `close` only ends the writing, and `commit`
    or `discard` decides. The spool can be sought and truncated like any file.
    """

    def __init__(
        self, publish: Callable[[Sequence[memoryview]], object], *, path: str, mode: str, autocommit: bool
    ) -> None:
        super().__init__()
        self._publish = publish
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115 - closed by close()
        self._discarded = False
        self.path = path
        self.mode = mode
        self.autocommit = autocommit

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._open_spool().write(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._open_spool().seek(offset, whence)

    def tell(self) -> int:
        return self._open_spool().tell()

    def truncate(self, size: int | None = None) -> int:
        spool = self._open_spool()
        spool.truncate(size)
        return spool.tell() if size is None else size

    def flush(self) -> None:
        """Nothing leaves before `close`."""

    def fileno(self) -> int:
        """The descriptor of the spool. Without one, torch's FsspecWriter would sync every disk of the machine."""
        spool = self._open_spool()
        descriptor = spool.fileno()
        spool.flush()
        return descriptor

    def close(self) -> None:
        """Publishes the file, unless it was discarded or a transaction decides. Raises what publishing raises."""
        if self.closed:
            return
        super().close()
        if self._discarded:
            self._spool.close()
        elif self.autocommit:
            self.commit()

    def commit(self) -> None:
        """Publishes a file that is closed. Called once."""
        try:
            self._publish(_contents(self._spool))
        finally:
            self._spool.close()

    def discard(self) -> None:
        """Forgets what was written. What is written from here on is forgotten too."""
        self._discarded = True
        if self.closed:
            self._spool.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a constructor that failed
            if not self.closed:
                if not self._discarded:
                    warnings.warn(
                        f"{self.path} was not closed: discarded", ResourceWarning, source=self, stacklevel=2
                    )
                self.discard()
                self.close()

    def _open_spool(self) -> tempfile.SpooledTemporaryFile[bytes]:
        if self.closed:
            raise ValueError(f"{self.path} is closed")
        return self._spool


class LayeredWriter(io.BufferedIOBase):
    """A compressor over a `SpoolFile`: closing it closes both, an exception discards both."""

    def __init__(self, compressor: Any, file: SpoolFile) -> None:
        super().__init__()
        self._compressor = compressor
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written: int = self._compressor.write(data)
        return written

    def discard(self) -> None:
        self._file.discard()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._compressor.close()
        except BaseException:
            self._file.discard()
            raise
        finally:
            self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            if not self.closed:
                self.discard()
                self.close()


class TextWriter(io.TextIOWrapper):
    """Text over a `SpoolFile` or `LayeredWriter`: an exception discards it."""

    def __init__(self, file: SpoolFile | LayeredWriter, **options: Any) -> None:
        super().__init__(file, **options)  # type: ignore[arg-type] # it asks for no more than BufferedIOBase
        self._file = file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.discard()
        self.close()


def _contents(spool: tempfile.SpooledTemporaryFile[bytes]) -> list[memoryview]:
    """All bytes of the spool, mapped where it is a file: large ones are never read into memory of ours."""
    size = spool.seek(0, io.SEEK_END)
    if size <= SPOOL_MEMORY_BYTES:
        spool.seek(0)
        return [memoryview(spool.read())]
    spool.flush()
    # Left for the garbage collector to unmap: the pool may still hold views when an error interrupts it.
    return [memoryview(mmap.mmap(spool.fileno(), size, access=mmap.ACCESS_READ))]
