"""What samples are handed out as, and the memory that those lie in which are not views of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, Literal, get_args

from torchcache.data.buffer_pool import BufferPool
from torchcache.errors import ConfigurationError

Output = Literal["bytes", "view", "numpy", "tensor"]

TOGETHER_BYTES: Final = 64 * 1024 * 1024
"""Samples of different sizes share a buffer if they are no more than this; else each has its own."""

_ALIGN_BYTES: Final = 64


def checked_output(output: str, *, decode: object, buffers: BufferPool | None) -> Output:
    """Raises ConfigurationError for another output than there is, and for what doesn't go with it."""
    if output not in get_args(Output):
        raise ConfigurationError(f"output={output!r} is none of {', '.join(map(repr, get_args(Output)))}")
    if decode is not None and output != "bytes":
        raise ConfigurationError(
            f"decode= makes the sample out of a read-only memoryview, output={output!r} says what to make of it: give "
            "one of them; transform= runs on either"
        )
    if buffers is not None and output not in ("numpy", "tensor"):
        raise ConfigurationError(
            f"buffers= is the memory of samples with output='numpy' or 'tensor', not with {output!r}"
        )
    return output  # type: ignore[return-value]


class Landing:
    """The memory of a batch: a buffer a sample for the read to fill, and the samples made of them.

    Samples of equal size lie in one buffer, one behind the other, so that a batch of them is one tensor already.
    """

    def __init__(self, sizes: Sequence[int], buffers: BufferPool) -> None:
        """`sizes` are those of the samples, of which there is at least one."""
        self._equal = all(size == sizes[0] for size in sizes)
        starts = _starts(sizes, 1 if self._equal else _ALIGN_BYTES)
        if self._equal or starts[-1] <= TOGETHER_BYTES:
            spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
            self._parts = [(buffers.take(starts[-1]), spans)]
        else:
            self._parts = [(buffers.take(size), [slice(size)]) for size in sizes]

    def targets(self) -> list[memoryview]:
        """What the read fills."""
        views = ((buffer.numpy().data, spans) for buffer, spans in self._parts)
        return [view[span] for view, spans in views for span in spans]

    def joined_targets(self, counts: Sequence[int]) -> list[memoryview]:
        """What the read fills with runs of so many samples each, which are all of one size."""
        ((buffer, spans),) = self._parts
        view, ends = buffer.numpy().data, [*accumulate(counts)]
        starts = [spans[end - count].start for count, end in zip(counts, ends, strict=True)]
        return [view[start : spans[end - 1].stop] for start, end in zip(starts, ends, strict=True)]

    def samples(self, output: Output) -> list[Any]:
        """The samples, in order: writable, of one dimension of uint8."""
        if output == "numpy":
            return [buffer.numpy()[span] for buffer, spans in self._parts for span in spans]
        if self._equal:
            ((buffer, spans),) = self._parts
            return [*buffer.view(len(spans), -1).unbind()] if len(buffer) else [buffer for _ in spans]
        return [buffer[span] for buffer, spans in self._parts for span in spans]


def _starts(sizes: Sequence[int], align: int) -> list[int]:
    """Where each begins if they lie one behind the other, and where the last ends."""
    return [0, *accumulate(-(-size // align) * align for size in sizes)]
