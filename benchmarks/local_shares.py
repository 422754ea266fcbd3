"""How many reads are local where every node has a server: LocalitySampler beside DistributedSampler, by placement."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from benchmarks.findings import Findings, Row, Scale
from torchcache.data.locality import handed_out, local_share
from torchcache.model import ObjectId
from torchcache.placement import Placement, placement_key

RANKS: Final = 8
"""Of a node."""

EACH: Final = 64
"""Samples of a rank in a global batch."""


def measure(scale: Scale) -> Findings:
    """One to eight nodes. Nothing is read: who owns what follows from names alone."""
    count = 8192 if scale.tiny else 131_072
    rows = [
        Row(
            what=f"{nodes} nodes",
            unit="of reads local",
            ours=share_of(nodes, count),
            bare=1 / nodes,
            against="DistributedSampler",
            better="more",
        )
        for nodes in ((2, 8) if scale.tiny else range(1, 9))
    ]
    note = f"{RANKS} ranks a node, {EACH} samples each in a batch, {count:,} samples."
    return Findings(title="Samples read where they lie", rows=rows, note=note)


def share_of(nodes: int, count: int) -> float:
    """The part of reads that are local to the rank that LocalitySampler gives them to."""
    servers = [f"server-{node}" for node in range(nodes)]
    keys = [placement_key(ObjectId("s3", f"bucket/{number}", "v"), 0) for number in range(count)]
    placement = Placement(servers)
    lies = np.array([servers.index(placement.owner(key)) for key in keys])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    ranks = np.repeat(np.arange(nodes), RANKS)
    step = len(ranks) * EACH
    batches = [lies[order[at : at + step]] for at in range(0, count - step + 1, step)]
    return float(np.mean([local_share(batch, ranks, handed_out(batch, ranks)) for batch in batches]))
