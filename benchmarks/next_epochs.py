"""Prefetch of the next epoch: a dataset twice the cache's size behind a slow S3, with and without the order told."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from torch.utils.data import DistributedSampler

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import local_pool, memory_folder
from benchmarks.slow_network import far_away
from examples.seaweedfs import SeaweedFS, environment

LATENCY_S: Final = 0.05
BYTES_S: Final = 200e6
STEP_S: Final = 0.05
"""What a batch is computed for."""

OBJECT_BYTES: Final = 1 << 20
BATCH: Final = 16
EPOCHS: Final = 2
_ROUNDS: Final = 3


def measure(scale: Scale) -> Findings:
    """Epochs in a new pool each time, by turns with and without; the medians of three."""
    count = 32 if scale.tiny else 384
    rounds = 1 if scale.tiny else min(_ROUNDS, scale.rounds)
    with memory_folder() as root, ExitStack() as closing:
        server = closing.enter_context(SeaweedFS(root / "s3"))
        closing.enter_context(environment(server.environment()))
        bucket = server.make_bucket()
        for number in range(count):
            server.client.put_object(Bucket=bucket, Key=f"far/{number:05d}", Body=os.urandom(OBJECT_BYTES))
        url = closing.enter_context(far_away(server.endpoint_url, latency_s=LATENCY_S, bytes_s=BYTES_S))
        closing.enter_context(environment({"AWS_ENDPOINT_URL": url}))
        took: dict[bool, list[list[float]]] = {False: [], True: []}
        for turn in range(rounds):
            for told in (False, True):
                with memory_folder() as place:
                    took[told].append(_epochs(place / f"pool{turn}", f"s3://{bucket}/far", count, told=told))
    without, with_it = (_medians(took[told]) for told in (False, True))
    names = ("epoch 1, from S3", "epoch 2")
    goals = (Goal(bound=0.95), Goal(bound=1.5))
    rows = [
        Row(what=name, unit="s", ours=ours, bare=bare, against="no prefetch", goal=goal)
        for name, ours, bare, goal in zip(names, with_it, without, goals, strict=True)
    ]
    note = (
        f"{count} objects of 1 MiB, a cache of half of them, {LATENCY_S * 1e3:.0f} ms and {BYTES_S / 1e6:.0f} MB/s to "
        f"S3, batches of {BATCH} that compute for {STEP_S * 1e3:.0f} ms; medians of {rounds}."
    )
    return Findings(title="The next epoch, fetched while this one trains", rows=rows, note=note)


def _medians(rounds: list[list[float]]) -> list[float]:
    return [statistics.median(epoch) for epoch in zip(*rounds, strict=True)]


def _epochs(place: Path, uri: str, count: int, *, told: bool) -> list[float]:
    """Seconds that each epoch takes."""
    capacity_bytes = count * OBJECT_BYTES // 2 + (8 << 20)
    times = []
    with local_pool(place, capacity_bytes=capacity_bytes, own=True) as warm:
        dataset = tc.CachedDataset.from_files(uri, pool=warm.pool)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=1)
        prefetch = dataset.prefetch(sampler, 0, epochs=None) if told else None
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            began_s = time.monotonic()
            order = list(sampler)
            for at in range(0, count, BATCH):
                dataset.__getitems__(order[at : at + BATCH])
                time.sleep(STEP_S)
            times.append(time.monotonic() - began_s)
        if prefetch is not None:
            prefetch.cancel()
    return times
