"""What Prometheus is told. Values are read when they are scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from torchcache_server.cache.ahead import Ahead, StageAhead
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.service.admission import Admission
from torchcache_server.service.counters import CopyCounts, ServiceCounters
from torchcache_server.service.latencies import BOUNDS_S, Latencies
from torchcache_server.service.passed_over import PassedOver
from torchcache_server.service.requests import REASONS
from torchcache_server.store import Store, StoreUsage
from torchcache_server.understore.base import UnderStore

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class ServerCollector(Collector):
    """What `GetStatus` tells, as metrics named torchcache_*. Labels are under-stores' names: nothing unbounded."""

    def __init__(
        self,
        *,
        store: Store,
        under_stores: Mapping[str, UnderStore],
        read_through: ReadThrough,
        write_back: WriteBack,
        counters: ServiceCounters,
        admission: Admission,
        ahead: StageAhead,
        copies: Callable[[], CopyCounts | None],
    ) -> None:
        self._store = store
        self._under_stores = under_stores
        self._read_through = read_through
        self._write_back = write_back
        self._counters = counters
        self._admission = admission
        self._ahead = ahead
        self._copies = copies
        self._pending_since = time.monotonic()

    def collect(self) -> Iterator[Family]:
        """The families of one scrape."""
        usage = self._store.usage()
        served = self._counters
        yield _gauge("store_capacity_bytes", "Bytes the store may hold", usage.capacity_bytes)
        yield _gauge("store_used_bytes", "Bytes the store holds", usage.used_bytes)
        yield _gauge("store_chunks", "Chunks the store holds", usage.chunks)
        yield _gauge("store_segments", "Segment files of the store", usage.segments)
        yield from _disk_families(usage)
        yield _counter("lookup_hits", "Chunks looked up and found", usage.hits)
        yield _counter("lookup_misses", "Chunks looked up and not found", usage.misses)
        yield _counter("corrupt_chunks", "Chunks quarantined for a wrong checksum", usage.corrupt)
        yield _counter("evicted_chunks", "Chunks evicted", usage.evicted_chunks)
        yield _counter(
            "passed_through_chunks", "Chunks served without being kept", self._read_through.passed_through
        )
        yield _counter("filled_chunks", "Chunks fetched for readers", self._read_through.filled_chunks)
        yield _counter("filled_bytes", "Bytes fetched for readers", self._read_through.filled_bytes)
        filling = self._read_through.filling_bytes
        yield _gauge("filling_bytes", "Bytes being fetched from under-stores now", filling)
        waiting = self._read_through.waiting_fills
        yield _gauge("waiting_fills", "Chunks to be fetched that wait for their turn", waiting)
        yield _counter("read_calls", "do_get calls", served.read_calls)
        yield _counter(
            "hedged_read_calls", "do_get calls that another server was late for", served.hedged_calls
        )
        yield _counter("write_calls", "calls that wrote, by either lane", served.write_calls)
        yield _counter("served_bytes", "Bytes served by do_get", served.served_bytes)
        yield _counter("written_bytes", "Bytes taken in by do_put", served.written_bytes)
        yield from _lane_families(served)
        yield _call_family(served.latencies)
        yield _passed_over_family(served.passed_over)
        yield _gauge("data_streams", "Data streams that run now", self._admission.streams)
        refused = self._admission.refused_streams
        yield _counter("refused_streams", "Data streams refused because too many ran", refused)
        refused = self._admission.refused_calls
        yield _counter("refused_calls", "Control calls refused because too many were at work", refused)
        refused = self._read_through.refused_fills
        yield _counter("refused_fills", "Chunks whose turn to be fetched didn't come in time", refused)
        yield _gauge("upload_pending_bytes", "Bytes not yet in the under-store", self._pending_bytes())
        yield _gauge(
            "upload_pending_seconds",
            "How long there have been such bytes at every scrape",
            time.monotonic() - self._pending_since,
        )
        yield self._saves()
        yield _gauge(
            "save_oldest_pending_seconds",
            "Age of the oldest checkpoint that this server has yet to upload",
            self._write_back.holdings.oldest_s,
        )
        yield from _copy_families(self._copies() or CopyCounts())
        yield from _order_families(self._ahead.standings())
        yield from self._under_store_families()

    def _pending_bytes(self) -> int:
        pending_bytes = self._write_back.pending_bytes
        if not pending_bytes:
            self._pending_since = time.monotonic()
        return pending_bytes

    def _saves(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "torchcache_saves", "Checkpoints that this server holds, by how far they are", labels=["state"]
        )
        for state, count in self._write_back.counts().items():
            family.add_metric([state], count)
        return family

    def _under_store_families(self) -> Iterator[Family]:
        for field, text in (
            ("read_requests", "Requests for bytes sent to the under-store"),
            ("read_bytes", "Bytes read from the under-store"),
            ("write_requests", "Requests that wrote to the under-store"),
            ("write_bytes", "Bytes written to the under-store"),
            ("meta_requests", "Requests to the under-store that moved no object bytes"),
            ("retries", "Requests to the under-store that were tries again"),
        ):
            family = CounterMetricFamily(f"torchcache_under_store_{field}", text, labels=["under_store"])
            for name, under_store in self._under_stores.items():
                family.add_metric([name], getattr(under_store.counters, field))
            yield family


def _lane_families(served: ServiceCounters) -> Iterator[Family]:
    """What was read, by lane; on the local one, by what clients say."""
    family = CounterMetricFamily("torchcache_lane_read_bytes", "Bytes read, by lane", labels=["lane"])
    family.add_metric(["flight"], served.served_bytes)
    family.add_metric(["local"], served.local_bytes)
    yield family
    yield _counter("local_chunks", "Chunks read by clients from the store's files", served.local_chunks)


def _call_family(latencies: Latencies) -> HistogramMetricFamily:
    """From begin to end, which is when the client has taken all of it; "read_filled" waited for an under-store."""
    family = HistogramMetricFamily("torchcache_call_seconds", "How long calls took, by kind", labels=["call"])
    for kind, one in latencies.read().items():
        counts = accumulate(one.counts)
        bounds = [*(f"{bound_s:g}" for bound_s in BOUNDS_S), "+Inf"]
        family.add_metric([kind], list(zip(bounds, map(float, counts), strict=True)), one.total_s)
    return family


def _passed_over_family(passed_over: PassedOver) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "torchcache_passed_over_servers", "Other servers that clients of this one ask last", labels=["reason"]
    )
    told = {server: reason for server, reason in passed_over.counts()}
    for reason in sorted(REASONS):
        family.add_metric([reason], sum(each == reason for each in told.values()))
    return family


def _copy_families(copies: CopyCounts) -> Iterator[Family]:
    yield _gauge(
        "copies_wanted", "Copies that checkpoints which wait for their upload are to have", copies.wanted
    )
    yield _gauge("copies_held", "Copies that they have, as far as was found", copies.held)
    yield _counter("copies_made", "Copies made again in place of lost ones", copies.made)
    yield _counter("mended_chunks", "Damaged chunks fetched again from another server", copies.mended_chunks)


def _order_families(orders: Sequence[Ahead]) -> Iterator[Family]:
    yield _gauge("orders", "Orders of reading that are known", len(orders))
    yield _gauge("order_chunks", "Chunks of these orders", sum(o.standing.chunks for o in orders))
    yield _gauge("ahead_bytes", "Bytes fetched and not yet read", sum(o.ahead_bytes for o in orders))
    yield _gauge("ahead_coming_chunks", "Chunks being fetched ahead", sum(o.coming_chunks for o in orders))


def _disk_families(usage: StoreUsage) -> Iterator[Family]:
    yield _gauge("store_spare_bytes", "Bytes in files kept to be written again", usage.spare_bytes)
    yield _gauge("store_dead_bytes", "Bytes in segments whose chunks are gone", usage.dead_bytes)
    yield _gauge("store_overhead_bytes", "Bytes of the index and the records", usage.overhead_bytes)
    yield _gauge("store_free_bytes", "Bytes free on the store's file system", usage.free_bytes)
    yield _gauge(
        "store_min_free_bytes", "Bytes that the store leaves free on its file system", usage.min_free_bytes
    )
    yield _counter("recycled_segments", "Segment files written again", usage.recycled_segments)
    yield _counter("compacted_bytes", "Bytes copied out of segments mostly dead", usage.compacted_bytes)
    yield _counter("expired_chunks", "Chunks dropped for their time to live", usage.expired_chunks)
    yield _counter("store_scrubbed_bytes", "Bytes verified by the scrub", usage.scrubbed_bytes)
    yield _counter("store_scrub_rounds", "Times the scrub went through the whole store", usage.scrub_rounds)
    yield _gauge("store_damaged_kept", "Damaged chunks without another copy", usage.damaged_kept)
    yield _counter("store_disk_errors", "Errors of the store's disk", usage.disk_errors)
    yield _gauge("store_out_of_service", "1 if the disk is not used any more", bool(usage.out_of_service))


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"torchcache_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"torchcache_{name}", text, value=value)
