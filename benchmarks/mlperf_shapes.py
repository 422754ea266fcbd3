"""The workloads of MLPerf Storage v2.0, and the order in which simulated accelerators read them. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple


class Sample(NamedTuple):
    """`length` bytes at `offset` of file number `file`."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What an accelerator eats: `batch` samples a step, `compute_s` each step.

    `files` and `steps` are ours, for a machine of this size: MLPerf asks for five times the memory. `group` samples are
    one request of a reader; `slots` batches have memory, the one that is computed on included.
    """

    name: str
    sample_bytes: int
    stdev_bytes: int = 0
    samples_a_file: int = 1
    batch: int
    compute_s: float
    least_utilisation: float
    accelerators: int
    """How many are to be fed at that utilisation."""
    files: int
    steps: int
    group: int = 1
    slots: int = 2
    most: int
    """Where the search for the most accelerators ends: memory, or the processes a small machine can bear."""

    def file_sizes(self) -> list[int]:
        """Normally distributed, within two deviations, and of the right mean: few files would miss it by chance."""
        chance = random.Random(self.name)
        drawn = [chance.gauss(0, 1) for _ in range(self.files)]
        centre = sum(drawn) / len(drawn)
        spread = [max(-2.0, min(2.0, d - centre)) * self.stdev_bytes for d in drawn]
        return [self.samples_a_file * self.sample_bytes + round(s) for s in spread]


UNET3D: Final = Workload(
    name="3D-Unet",
    sample_bytes=146_600_628,
    stdev_bytes=68_341_808,
    batch=7,
    compute_s=0.323,
    least_utilisation=0.9,
    accelerators=1,
    files=12,
    steps=30,
    most=4,
)
RESNET50: Final = Workload(
    name="ResNet50",
    sample_bytes=114_660,
    samples_a_file=1251,
    batch=400,
    compute_s=0.224,
    least_utilisation=0.9,
    accelerators=4,
    files=12,
    steps=40,
    group=100,
    most=32,
)
COSMOFLOW: Final = Workload(
    name="CosmoFlow",
    sample_bytes=2_828_486,
    stdev_bytes=71_311,
    batch=1,
    compute_s=0.0035,
    least_utilisation=0.7,
    accelerators=1,
    files=400,
    steps=1500,
    slots=8,
    most=8,
)
WORKLOADS: Final = (UNET3D, RESNET50, COSMOFLOW)


def tiny(workload: Workload) -> Workload:
    """To see that it runs: a hundredth of the bytes."""
    return replace(
        workload,
        sample_bytes=workload.sample_bytes // 100,
        stdev_bytes=workload.stdev_bytes // 100,
        samples_a_file=min(workload.samples_a_file, 10),
        batch=min(workload.batch, 8),
        compute_s=workload.compute_s / 20,
        files=8,
        steps=3,
        accelerators=1,
        most=1,
    )


def batches(
    workload: Workload, sizes: Sequence[int], *, accelerator: int, accelerators: int
) -> list[list[Sample]]:
    """The batches of all steps of one of several accelerators.

    As DLIO reads: each epoch the files are shuffled and shared out, and the samples of a file follow one another.
    """
    samples = _endless(workload, sizes, accelerator, accelerators)
    return [[next(samples) for _ in range(workload.batch)] for _ in range(workload.steps)]


def _endless(
    workload: Workload, sizes: Sequence[int], accelerator: int, accelerators: int
) -> Iterator[Sample]:
    files, epoch = list(range(len(sizes))), 0
    while True:
        order = random.Random(epoch).sample(files, len(files))
        # With more accelerators than files some of them read the same ones.
        for file in order[accelerator::accelerators] or [order[accelerator % len(order)]]:
            length = sizes[file] // workload.samples_a_file
            for number in range(workload.samples_a_file):
                yield Sample(file, number * length, length)
        epoch += 1


def utilisation(compute_s: float, steps: int, wall_s: float) -> float:
    """Accelerator utilisation of `steps` steps that took `wall_s`, the first step not among them."""
    return compute_s * steps / wall_s if wall_s > 0 else 0.0
