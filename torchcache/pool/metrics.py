"""What one process asked of a pool, as metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from torchcache.pool.client import Pool

COUNTERS: Final = {
    "read_calls": "Calls to a server that read",
    "write_calls": "Calls to a server that wrote",
    "control_calls": "Calls to a server that did neither",
    "extents": "Samples, or parts of objects, that were read",
    "read_bytes": "Bytes read",
    "local_bytes": "Bytes of these read from a server's files",
    "written_bytes": "Bytes that a server acknowledged",
    "retries": "Calls made again",
    "retries_refused": "Calls not made again because the budget was spent",
    "suspects": "Extents that came damaged and were asked for again",
    "put_out": "Times that reads began to pass over a server",
    "probes": "Times that a server which is passed over was tried",
    "hedges": "Calls that were late and asked of the next server too",
    "hedged_extents": "Extents that were asked for twice",
    "hedges_won": "Hedges that were answered first",
    "hedges_refused": "Hedges not made because the budget was spent",
}
"""Fields of `PoolStatistics` that only grow, and what each means."""


class PoolCollector(Collector):
    """`Pool.statistics()` of the process that is asked, as torchcache_client_*, for a registry of prometheus_client.

    `prometheus_client.REGISTRY.register(tc.PoolCollector(pool))`, where the job serves its metrics.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The families of one scrape. Asks no server."""
        seen = self._pool.statistics()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"torchcache_client_{name}", text, value=getattr(seen, name))
        lanes = GaugeMetricFamily(
            "torchcache_client_servers",
            "Servers of the pool, by the lane that bytes travel by",
            labels=["lane"],
        )
        for lane in sorted(set(seen.lanes.values())):
            lanes.add_metric([lane], sum(one == lane for one in seen.lanes.values()))
        yield lanes
        out = GaugeMetricFamily(
            "torchcache_client_server_passed_over",
            "1 for each server that reads pass over",
            labels=["server"],
        )
        for server in sorted(seen.out):
            out.add_metric([server], 1)
        yield out
