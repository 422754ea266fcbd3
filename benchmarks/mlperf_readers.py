"""What reads ahead for a simulated accelerator: threads of its own, or the workers of a torch DataLoader.

Threads read into the accelerator's memory, which is used again. Workers read into their own and hand on the number of
bytes, as DLIO's hand on a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

from benchmarks.mlperf_shapes import Sample, Workload
from benchmarks.mlperf_sources import Source

Kind = Literal["threads", "processes"]
Plan = Sequence[Sequence[Sample]]


@contextmanager
def reader(
    kind: Kind, workload: Workload, source: Source, readers: int, plan: Plan
) -> Iterator[Iterator[int]]:
    """The bytes of each batch of `plan`, in order, each once all of it is in memory."""
    if kind == "threads":
        with ThreadPoolExecutor(readers) as threads:
            yield _read_by_threads(threads, workload, source, plan)
        return
    from torch.utils.data import DataLoader

    loader: DataLoader[int] = DataLoader(
        _Batches(source, plan),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=readers,
        multiprocessing_context="fork",  # the default of whom a forkserver started is another one, of its own
    )
    iterator: Any = iter(loader)
    try:
        yield iterator
    finally:
        iterator._shutdown_workers()


def _read_by_threads(
    threads: ThreadPoolExecutor, workload: Workload, source: Source, plan: Plan
) -> Iterator[int]:
    """A batch's memory is read into again when the next batch is asked for."""
    slots = [_memory(source, plan) for _ in range(workload.slots)]
    samples_held: list[object] = [None] * workload.slots

    def start(step: int) -> list[Future[object]]:
        samples_held[step % len(slots)] = None  # of the batch that was here
        samples, buffers = plan[step], _cut(slots[step % len(slots)], plan[step])
        places = range(0, len(samples), workload.group)
        groups = [slice(at, at + workload.group) for at in places]
        return [threads.submit(source.read, samples[group], buffers[group]) for group in groups]

    steps = range(min(len(slots), len(plan)))
    # Once for memory that is there, as it is ever after. It falls into the first step, which doesn't count.
    [part.result() for step in steps for part in start(step)]
    pending = [start(step) for step in steps]
    for step, batch in enumerate(plan):
        samples_held[step % len(slots)] = [part.result() for part in pending[step]]
        pending[step] = []
        yield sum(sample.length for sample in batch)
        if step + len(slots) < len(plan):
            pending.append(start(step + len(slots)))


class _Batches:
    """A dataset whose items are whole batches, read into memory of the worker's."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self._source, self._plan = source, plan
        self._memory: memoryview | None = None

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> int:
        if self._memory is None:
            self._memory = _memory(self._source, self._plan)
        batch = self._plan[step]
        self._source.read(batch, _cut(self._memory, batch))
        return sum(sample.length for sample in batch)


def _memory(source: Source, plan: Plan) -> memoryview:
    """Room for any batch, every page of it written once; none for a source that has its own."""
    if source.own_memory:
        return memoryview(b"")
    return memoryview(bytearray(b"\xff") * max(sum(sample.length for sample in batch) for batch in plan))


def _cut(memory: memoryview, batch: Sequence[Sample]) -> list[memoryview]:
    buffers, at = [], 0
    for sample in batch:
        buffers.append(memory[at : at + sample.length])
        at += sample.length
    return buffers
