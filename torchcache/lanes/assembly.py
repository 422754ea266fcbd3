"""From the pieces a server sends to the bytes an extent asked for. Pure, and trusts no peer.

Every piece is verified against its checksums, must continue where the last one ended, stay inside its chunk, and speak
of an object of the size we know. One piece becomes a view into what came; several are put together in one buffer.

A small object that comes whole, as a training batch consists of, is landed in a few lines of `Arrivals`; whatever
isn't just that goes through an `Assembly`, which also finds the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from torchcache.errors import ConfigurationError, IntegrityError, TorchCacheError
from torchcache.lanes.copying import SHARED_BYTES, copy, hashed_copy
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, UNKNOWN_SIZE, Extent
from torchcache.wire.codec import Piece, decode_pieces, is_intact
from torchcache.wire.status import decode_error


class Arrivals:
    """What one call brings: an outcome for each of `extents`, in the memory of `into` where that has some.

    Errors name the `server` and the call's `request_id`.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        server: str,
        request_id: str | None = None,
    ) -> None:
        self._extents = extents
        self._into = into
        self._server = server
        self._request_id = request_id
        self._landed: list[memoryview | TorchCacheError | None] = [None] * len(extents)
        self._assemblies: dict[int, Assembly] = {}

    def take(self, batch: pa.RecordBatch) -> None:
        """Lands the pieces of one batch. Raises IntegrityError for a batch that can't be read."""
        landed, assemblies = self._landed, self._assemblies
        for piece in decode_pieces(batch):
            number = piece[0]
            if number >= len(landed):
                message = f"the answer speaks of extent {number}, which was not asked for"
                raise IntegrityError(message, server=self._server)
            if landed[number] is not None:
                landed[number] = self._too_many(number)
            elif number in assemblies or not self._land_whole(piece):
                assembly = assemblies.get(number)
                if assembly is None:
                    assembly = assemblies[number] = Assembly(self._extents[number], self._into[number])
                assembly.add(piece, self._server)

    def _land_whole(self, piece: Piece) -> bool:
        """Whether the piece is all of a small object, as it was asked for, and intact; then it has landed."""
        number, object_size, offset, whole, digests, data, error = piece
        (_, size), start, length = self._extents[number]
        target = self._into[number]
        if (
            not (whole and error is None and offset == start == 0)
            or not data.size == object_size == size
            or length not in (-1, size)
            or not 0 < size <= CHUNK_BYTES
            or (target is not None and not size <= len(target) <= SHARED_BYTES)
            or not is_intact(data, digests)
        ):
            return False
        view = memoryview(data).cast("B")  # Arrow's bytes are signed, which Python will not assign to its own
        if target is None:
            self._landed[number] = view.toreadonly()
        else:
            filled = target if len(target) == size else target[:size]
            copy(view, filled)
            self._landed[number] = filled
        return True

    def _too_many(self, number: int) -> IntegrityError:
        return IntegrityError(
            "more came of an object than it has",
            object=str(self._extents[number].object.id),
            server=self._server,
            request_id=self._request_id,
        )

    def outcomes(self, failure: TorchCacheError | None) -> list[memoryview | TorchCacheError]:
        """Of each extent its bytes, or its own error, or what ended the stream (`failure`) before it was complete."""
        return [
            self._named(self._assembly(number).outcome(failure, self._server)) if found is None else found
            for number, found in enumerate(self._landed)
        ]

    def _named(self, outcome: memoryview | TorchCacheError) -> memoryview | TorchCacheError:
        if isinstance(outcome, TorchCacheError):
            outcome.request_id = self._request_id
        return outcome

    def _assembly(self, number: int) -> Assembly:
        return self._assemblies.get(number) or Assembly(self._extents[number], self._into[number])


def is_copied_intact(piece: Piece, source: memoryview, target: memoryview) -> bool:
    """Copies all bytes of a whole chunk, and says whether those that then lie in `target` match its checksum."""
    return hashed_copy(source, target).to_bytes(8, "little") == piece.digests


def check_piece(piece: Piece, object_size: int) -> None:
    """Raises IntegrityError unless the piece lies within one chunk of an object of `object_size` bytes."""
    length = piece.data.size
    in_chunk = piece.offset % CHUNK_BYTES
    chunk_length = min(CHUNK_BYTES, object_size - (piece.offset - in_chunk))
    good = (
        piece.object_size == object_size
        and 0 <= piece.offset <= object_size
        and in_chunk + length <= max(chunk_length, 0)
        and (in_chunk == 0 and length == chunk_length if piece.whole else piece.offset % BLOCK_BYTES == 0)
    )
    if not good:
        raise IntegrityError(
            f"a piece of {length} bytes at {piece.offset} does not fit an object of {object_size} bytes"
        )


class Assembly:
    """One extent on its way. `into`, if given, is filled; else memory is taken only where pieces must be joined."""

    __slots__ = ("_buffer", "_end", "_extent", "_into", "_position", "_size", "_view", "error")

    def __init__(self, extent: Extent, into: memoryview | None) -> None:
        self._extent = extent
        self._into = into
        self._size = extent.object.size
        self._end = -1 if self._size == UNKNOWN_SIZE and extent.length < 0 else extent.end
        self._position = extent.offset
        self._view: memoryview | None = None
        self._buffer: memoryview | None = None
        self.error: TorchCacheError | None = None

    @property
    def complete(self) -> bool:
        """Every byte came."""
        return self.error is None and self._view is not None and self._position == self._end

    def add(self, piece: Piece, server: str) -> None:
        """Takes one piece; a bad one becomes the extent's error, and the rest is ignored."""
        if self.error is not None:
            return
        if piece.error is not None:
            self.error = decode_error(piece.error, server=server)
            return
        try:
            self._place(piece)
        except (IntegrityError, ConfigurationError) as error:
            self.error = type(error)(error.message, object=str(self._extent.object.id), server=server)

    def _place(self, piece: Piece) -> None:
        if self._size == UNKNOWN_SIZE:
            self._learn_size(piece.object_size)
        check_piece(piece, self._size)
        first = self._view is None
        end = min(self._end, piece.offset + piece.data.size)
        if (
            first and self._position == self._end
        ):  # nothing was asked for: the piece only shows that the object is there
            piece.verify()
            self._view = self._into[:0] if self._into is not None else memoryview(b"")
            return
        if not piece.offset <= self._position < end:
            raise IntegrityError(
                f"a piece at {piece.offset} came where byte {self._position} of {self._end} was due"
            )
        # Arrow's buffers count in signed bytes, which Python will not assign to its own.
        part = memoryview(piece.data).cast("B")[self._position - piece.offset : end - piece.offset]
        if first and end == self._end and self._into is None:
            piece.verify()
            self._view = part.toreadonly()
        else:
            self._join(piece, part)
        self._position = end

    def _learn_size(self, size: int) -> None:
        if size < 0:
            raise IntegrityError(f"a piece says that its object has {size} bytes")
        self._size = size
        if self._extent.length < 0:
            self._end = size
        if not self._extent.offset <= self._end <= size:
            raise ConfigurationError(
                f"bytes {self._extent.offset} to {self._end} were asked of an object of {size} bytes"
            )

    def _join(self, piece: Piece, part: memoryview) -> None:
        start = self._extent.offset
        if self._buffer is None:
            length = self._end - start
            if self._into is None:
                # Arrow's pool hands out pages it has used before, and does not clear them.
                self._buffer = memoryview(pa.allocate_buffer(length)).cast("B")
            elif len(self._into) < length:
                raise ConfigurationError(
                    f"{length} bytes don't fit the buffer of {len(self._into)} given for them"
                )
            else:
                self._buffer = self._into[:length]
            self._view = self._buffer if self._into is not None else self._buffer.toreadonly()
        at = self._position - start
        target = self._buffer[at : at + len(part)]
        if not piece.whole or len(part) < piece.data.size:
            piece.verify()
            copy(part, target)
        elif not is_copied_intact(piece, part, target):
            raise IntegrityError("a piece does not match its checksum")

    def outcome(self, failure: TorchCacheError | None, server: str) -> memoryview | TorchCacheError:
        """The bytes, or the extent's own error, or what ended the stream (`failure`) before it was complete."""
        if self.complete and self._view is not None:
            return self._view
        if self.error is not None:
            return self.error
        if failure is not None:
            return failure
        return IntegrityError(
            f"the answer ended at byte {self._position} of {self._end}",
            object=str(self._extent.object.id),
            server=server,
        )
