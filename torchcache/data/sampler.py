"""LocalitySampler: DistributedSampler's global batches, handed out so that most samples are read where they lie."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from torchcache.data.cached import CachedDataset
from torchcache.data.locality import Ints, handed_out, local_share, rank_hosts, server_nodes
from torchcache.data.sampler_state import Giving, sampler_state_of
from torchcache.errors import ConfigurationError
from torchcache.placement import Placement

_log = logging.getLogger("torchcache")

_UNKNOWN = -2


class LocalitySampler(StatefulDistributedSampler):  # type: ignore[misc]  # torchdata has no types
    """Each global batch has the members that torch's DistributedSampler would give it; locality decides who gets which.

    Where samples lie follows from their names and the pool's servers, so all ranks come to the same by themselves. What
    a rank reads is local to its node where that is possible with even ranks. Use it as a DistributedSampler:
    `set_epoch`, `DataLoader(sampler=)`, and `StatefulDataLoader`, which keeps its place. Other than torchdata's it goes
    on with another number of ranks and workers too.
    """

    def __init__(  # noqa: PLR0917 - torch's own
        self,
        dataset: Dataset[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        batch_size: int = 1,
        hosts: Sequence[str] | None = None,
    ) -> None:
        """`dataset` is a CachedDataset, or Subset or ConcatDataset of some; what stands before `*` is as torch has it.

        `batch_size` is the loader's, of one rank: samples are exchanged between ranks within `num_replicas` times so
        many. With 1 few can be.

        `hosts` names for each rank the host it runs on, as the pool's address does ("node0", or "node0:7440" where
        several servers are on one host). By default the ranks are spread evenly over the servers' hosts, in the order
        of the pool's address, as torchrun numbers them. These and the pool's address must be the same on all ranks.

        Raises ConfigurationError: another kind of dataset, hosts that don't fit. Raises ServerUnavailable if a server
        has yet to be met: where its samples lie can't be told, and ranks might think differently.
        """
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size}: it is a number of samples above 0")
        self.batch_size = batch_size
        self.start = 0  # position in the epoch's order from which on these ranks share it
        self._next_start = 0
        pool = _first(dataset).pool
        servers = pool.servers()
        hosts = rank_hosts(hosts, servers, self.num_replicas)
        nodes = server_nodes(hosts, servers)
        self._servers = list(servers)
        self._where = pool.placement(servers)
        self._node_of = np.array([nodes[server] for server in self._servers])
        self._ranks = np.array([list(dict.fromkeys(hosts)).index(host) for host in hosts])
        self._owners = np.full(len(dataset), _UNKNOWN, np.int16)  # type: ignore[arg-type]
        shares = self._where.shares()
        uneven = [shares] if len(set(shares)) > 1 else []
        self._placement = xxhash.xxh3_64_hexdigest(
            repr((sorted(nodes.items()), self._ranks.tolist(), batch_size, *uneven)).encode()
        )
        here = {
            server for server, address in servers.items() if pool.statistics().lanes.get(address) == "local"
        }
        if here and not any(nodes[server] == self._ranks[self.rank] for server in here):
            _log.warning(
                "rank %d runs on the host of %s, but LocalitySampler takes it to be on %s: give hosts=",
                *(self.rank, servers[min(here)], hosts[self.rank]),
            )

    def __iter__(self) -> Iterator[int]:
        """The rank's samples, from where the state loaded last says."""
        return Giving(self)

    def begin(self) -> Iterator[int]:
        """Takes the state loaded last, and gives the rank's samples from there; `yielded` is for who takes them."""
        self.yielded, self.start = self._place((0, 0))
        self.next_yielded: int | None = None
        return self._from(self.start, self.yielded)

    def _place(self, otherwise: tuple[int, int]) -> tuple[int, int]:
        """`yielded` and `start` of the state loaded last, unless that is used up."""
        return otherwise if self.next_yielded is None else (self.next_yielded, self._next_start)

    def _from(self, start: int, had: int) -> Iterator[int]:
        order = self._order(start)
        step = self.batch_size * self.num_replicas
        skip = had % self.batch_size
        for at in range(had // self.batch_size * step, len(order), step):
            batch = order[at : at + step]
            mine = batch[handed_out(self._nodes(batch), self._ranks) == self.rank]
            yield from mine[skip:].tolist()
            skip = 0

    def state_dict(self) -> dict[str, Any]:
        """How many samples this rank had of its epoch, and how they were handed out."""
        yielded, start = self._place((self.yielded, self.start))
        return {
            self._YIELDED: yielded,
            "start": start,
            "num_replicas": self.num_replicas,
            "batch_size": self.batch_size,
            "placement": self._placement,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from `state_dict` when next iterated.

        It is a state of this sampler's or a StatefulDistributedSampler's, of any rank, or of a StatefulDataLoader with
        one. With another number of ranks, other servers, ranks' hosts or batch size that is possible where a global
        batch ended: what is left of the epoch is dealt out anew. Raises ConfigurationError elsewhere: samples would be
        lost or repeated. Torchdata's state doesn't say how many ranks there were, so it is refused without: pass
        `{**state, "num_replicas": ranks_of_then}`.
        """
        state = sampler_state_of(state_dict)
        if state is None:  # the loader's epoch was over
            self.next_yielded = None
            return
        super().load_state_dict(state)
        had, start = state[self._YIELDED], state.get("start", 0)
        if state.get("placement") == self._placement:
            self._next_start = start
            return
        world, batch_size = (
            state.get("num_replicas", state_dict.get("num_replicas")),
            state.get("batch_size", 1),
        )
        if world is None and had:
            self.next_yielded = None
            raise ConfigurationError(
                f"the state is of {had} samples of one rank, and doesn't say how many ranks there were: give this "
                'sampler {**state, "num_replicas": ranks_of_then}'
            )
        world = world or self.num_replicas
        if had % batch_size and had < self._total(start, world) // world:
            self.next_yielded = None
            raise ConfigurationError(
                f"the state is of {had} samples into the epoch, within a global batch (of {batch_size} a rank, now "
                f"{self.batch_size}), and ranks, servers, hosts or batch size have changed since: which rank has had "
                "which can't be told. Resume with those of then, or from a state between batches"
            )
        self.next_yielded, self._next_start = 0, start + had * world

    def local_share(self) -> float:
        """The part of all ranks' samples of this epoch that lie on the node of the rank that reads them."""
        order = self._order()
        step = self.batch_size * self.num_replicas
        local = 0.0
        for start in range(0, len(order), step):
            nodes = self._nodes(order[start : start + step])
            local += local_share(nodes, self._ranks, handed_out(nodes, self._ranks)) * len(nodes)
        return local / len(order) if len(order) else 1.0

    def _order(self, start: int = 0) -> Ints:
        """The samples of all ranks from position `start` of DistributedSampler's order: rank r's are every R-th from r.

        What makes them even comes from the order's front, as there.
        """
        count = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(count, generator=generator).numpy()
        else:
            order = np.arange(count)
        rest, total = order[start:], self._total(start, self.num_replicas)
        return np.concatenate((rest, np.resize(order, max(0, total - len(rest)))))[:total]

    def _total(self, start: int, world: int) -> int:
        """How many samples `world` ranks get of the epoch from position `start` on."""
        left = max(0, len(self.dataset) - start)
        return (left if self.drop_last else left + -left % world) // world * world

    def _nodes(self, indices: Ints) -> Ints:
        """On which node each sample lies. Asked once of each: it takes some microseconds."""
        new = np.unique(indices[self._owners[indices] == _UNKNOWN])
        if len(new):
            number = {server: at for at, server in enumerate(self._servers)}
            owners = _owners(self.dataset, new.tolist(), self._where)
            self._owners[new] = [number[owner] for owner in owners]
        return self._node_of[self._owners[indices]]


def _first(dataset: Any) -> CachedDataset:
    """The (first) cached dataset in `dataset`. Raises ConfigurationError if it is of another kind."""
    if isinstance(dataset, Subset):
        return _first(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts = [_first(part) for part in dataset.datasets]
        if len({part.pool.address for part in parts}) > 1:
            raise ConfigurationError("LocalitySampler needs datasets of one pool; these are of several")
        return parts[0]
    if not isinstance(dataset, CachedDataset):
        raise ConfigurationError(
            "LocalitySampler is for a CachedDataset, or a Subset or ConcatDataset of some; not for "
            f"{type(dataset).__name__}"
        )
    return dataset


def _owners(dataset: Any, indices: Sequence[int], placement: Placement) -> Sequence[str]:
    """Of each sample the server that owns it."""
    if isinstance(dataset, Subset):
        return _owners(dataset.dataset, [dataset.indices[index] for index in indices], placement)
    if isinstance(dataset, ConcatDataset):
        ends = np.array(dataset.cumulative_sizes)
        parts = np.searchsorted(ends, indices, side="right")
        starts = np.concatenate(([0], ends))
        # `indices` come sorted: the parts follow each other.
        return [
            owner
            for part in np.unique(parts)
            for owner in _owners(
                dataset.datasets[part],
                (np.asarray(indices)[parts == part] - starts[part]).tolist(),
                placement,
            )
        ]
    owners: Sequence[str] = dataset.owners(indices, placement)
    return owners
