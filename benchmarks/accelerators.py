"""Simulated accelerators: processes that sleep for the compute of a step, and wait for the batch of the next.

Steps of all end together, as an allreduce would have it. What reads ahead is in mlperf_readers.py.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from queue import Empty
from typing import Any, Final

from benchmarks.mlperf_readers import Kind, reader
from benchmarks.mlperf_shapes import Workload, batches, utilisation
from benchmarks.mlperf_sources import Source

READERS: Final = 2
_LEAST_STEPS: Final = 3
_START_S: Final = 120.0
_END_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of several accelerators over one source."""

    workload: Workload
    sizes: Sequence[int]
    source: Source
    accelerators: int
    readers: int = READERS
    reader: Kind = "threads"


def lowest_utilisation(run: Run) -> float:
    """Of the accelerators' utilisations the lowest, between 0 and 1.

    Steps 2 to the last count. A run that can't reach the workload's threshold any more ends early; what it reached by
    then is its figure. Raises RuntimeError if an accelerator fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.utils.data"])
    barrier, found = context.Barrier(run.accelerators), context.Queue()
    children = [
        context.Process(
            target=_accelerator, args=(run, number, barrier, found), daemon=run.reader == "threads"
        )
        for number in range(run.accelerators)
    ]
    for child in children:
        child.start()
    try:
        figures = [_next(found, children) for _ in children]
    finally:
        for child in children:
            child.join(_END_S)
            child.terminate()
            child.join()
        found.close()
    failed = [figure for figure in figures if isinstance(figure, str)]
    if failed:
        raise RuntimeError(f"an accelerator failed: {failed[0]}")
    return min(figures)


def _next(found: Any, children: Sequence[Any]) -> float | str:
    while True:
        try:
            figure: float | str = found.get(timeout=1.0)
            return figure
        except Empty:
            if not any(child.is_alive() for child in children):
                return "it ended without a figure"


def _accelerator(run: Run, number: int, barrier: Barrier, found: Any) -> None:
    try:
        plan = batches(run.workload, run.sizes, accelerator=number, accelerators=run.accelerators)
        with reader(run.reader, run.workload, run.source, run.readers, plan) as loader:
            found.put(_train(run.workload, loader, barrier))
    except BaseException as error:
        barrier.abort()
        found.put(f"{type(error).__name__}: {error}")
        raise


def _train(workload: Workload, loader: Iterator[int], barrier: Barrier) -> float:
    """The utilisation of all steps behind the first, or of those until it was clear that the goal is out of reach."""
    barrier.wait(_START_S)
    most_s = workload.compute_s * (workload.steps - 1) / workload.least_utilisation
    first_ended = ended = 0.0
    steps = 0
    try:
        for _ in loader:
            time.sleep(workload.compute_s)
            barrier.wait()
            ended = time.perf_counter()
            steps += 1
            first_ended = first_ended or ended
            if steps >= _LEAST_STEPS and ended - first_ended > most_s:
                barrier.abort()
                break
    except threading.BrokenBarrierError:
        pass  # another one saw it first
    return utilisation(workload.compute_s, steps - 1, ended - first_ended)
