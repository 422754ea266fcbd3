"""Which rank of a global batch gets which of its samples, so that most are read where they lie. Pure.

A node is a number from 0; `NOWHERE` is that of a sample which lies on no rank's node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from torchcache.errors import ConfigurationError

Ints = NDArray[np.int64]

NOWHERE = -1


def handed_out(nodes: Ints, ranks: Ints) -> Ints:
    """The rank of each sample of one global batch, every rank getting as many as the others.

    `nodes` says on which node each sample lies, `ranks` on which each rank is; the batch divides by the ranks. As many
    samples as possible get a rank of their own node. Where all lie on one node it is as DistributedSampler deals them.
    """
    world = len(ranks)
    each = len(nodes) // world
    given = np.full(len(nodes), -1, np.int64)
    for node in np.unique(ranks):
        there = np.flatnonzero(ranks == node)
        samples = np.flatnonzero(nodes == node)[: each * len(there)]
        given[samples] = there[np.arange(len(samples)) % len(there)]
    left = np.flatnonzero(given < 0)
    if len(left):
        taken = np.bincount(given[given >= 0], minlength=world)
        free = np.repeat(np.arange(world), each - taken)
        turns = np.concatenate([np.arange(count, each) for count in taken])
        given[left] = free[np.lexsort((free, turns))]  # one to each rank, then the next
    return given


def local_share(nodes: Ints, ranks: Ints, given: Ints) -> float:
    """The part of a batch's samples that lie on the node of the rank they were given to."""
    return float(np.mean(nodes == ranks[given])) if len(nodes) else 1.0


def rank_hosts(hosts: Sequence[str] | None, servers: Mapping[str, str], world: int) -> list[str]:
    """The host of each of `world` ranks: as given, else the servers' hosts in their order, as many ranks on each.

    `servers` are addresses by id. Raises ConfigurationError if that can't be.
    """
    if hosts is not None:
        if len(hosts) != world:
            raise ConfigurationError(
                f"hosts= names {len(hosts)} hosts, one for each of {world} ranks is needed"
            )
        return list(hosts)
    found = list(dict.fromkeys(map(_host, servers.values())))
    if world % len(found) and world > 1:
        raise ConfigurationError(
            f"{world} ranks don't divide by the {len(found)} hosts of the pool's servers: give hosts=, the host of "
            "each rank"
        )
    return [found[rank * len(found) // world] for rank in range(world)]


def server_nodes(hosts: Sequence[str], servers: Mapping[str, str]) -> dict[str, int]:
    """On which node each server is, by its id. A node is the place of its host among the distinct of `hosts`.

    An entry of `hosts` is a server's host, or its address where several are on one host.
    """
    nodes = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return {
        server: nodes.get(address, nodes.get(_host(address), NOWHERE)) for server, address in servers.items()
    }


def _host(address: str) -> str:
    return address.rpartition(":")[0]
