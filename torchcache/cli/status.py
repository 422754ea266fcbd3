"""`torchcache status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.output import Alert, duration_text, percent_text, policy_text, size_text
from torchcache.cli.recent_saves import RecentSaves, show_recent_saves
from torchcache.cli.residencies import Residencies, show_datasets, show_residencies
from torchcache.cli.watching import watch
from torchcache.errors import ServerUnavailable

if TYPE_CHECKING:
    from torchcache.cli.output import Output
    from torchcache.cli.recent_saves import RecentSave
    from torchcache.cli.residencies import DatasetResidency
    from torchcache.cli.watching import Rates
    from torchcache.pool import CopiesStatus, NamespaceStatus, Pool, PoolStatistics, ServerStatus

_REASONS: Final = {
    "unreachable": "they can't reach it",
    "silent": "it gives them no sign of life",
    "slow": "it is far slower than the others",
}


@click.command(epilog=EXIT_CODES, short_help="Show how the pool's servers are.")
@click.option(
    "--watch",
    "every_s",
    metavar="[SECONDS]",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=2.0,
    help="Show it again and again, with rates and the newest checkpoints, until Ctrl-C. [2] With --json a document in "
    "each line.",
)
@click.option(
    "--residency",
    is_flag=True,
    help="List each dataset in storage, and show how much of it the pool holds. Takes as long as listing them.",
)
@command
def status(session: Session, *, every_s: float | None, residency: bool) -> None:
    """Show how the pool's servers are, what they hold and what they asked of storage.

    Never starts a pool: exit code 3 if none runs. Counters run since each server started.
    """
    pool = _running_embedded_pool() if session.uses_embedded_pool else session.pool

    residencies = Residencies(pool) if residency else None
    recent_saves = RecentSaves(pool) if every_s is not None else None

    def show(servers: list[ServerStatus], rates: list[Rates]) -> None:
        unreachable = _unreachable(pool, servers)
        held = residencies.of(servers) if residencies else None
        recent = recent_saves.of(servers) if recent_saves else None
        _show(session.output, pool, servers, unreachable, rates, residencies=held, recent_saves=recent)

    if every_s is None:
        show(pool.status(), [])
    else:
        session.output.one_line = True
        watch(session.output, pool.status, show, every_s)


def _unreachable(pool: Pool, servers: list[ServerStatus]) -> list[str]:
    """Those that aren't among `servers`. Asked before anything else, at which one of them may answer again."""
    answering = {server.address for server in servers}
    return [address for address in pool.unreachable() if address not in answering]


def _show(
    output: Output,
    pool: Pool,
    servers: list[ServerStatus],
    unreachable: list[str],
    rates: list[Rates],
    *,
    residencies: list[DatasetResidency] | None,
    recent_saves: list[RecentSave] | None,
) -> None:
    from torchcache.pool.health import far_slower

    seen, answers_s = pool.statistics(), pool.answers_s()
    slow = far_slower({address: took_s for address, took_s in answers_s.items() if took_s is not None})
    passed_over = _passed_over(servers)
    output.document(
        {
            "servers": [dataclasses.asdict(server) for server in servers],
            "unreachable": unreachable,
            "lanes": seen.lanes,
            "lane_reasons": seen.lane_reasons,
            "answers_s": answers_s,
            "slow": slow,
            "passed_over": [
                {"server": server, "reason": reason, "clients": clients}
                for (server, reason), clients in passed_over.items()
            ],
            **({"rates": [dataclasses.asdict(rate) for rate in rates]} if rates else {}),
            **(
                {"residency": [{**dataclasses.asdict(one), "fraction": one.fraction} for one in residencies]}
                if residencies is not None
                else {}
            ),
            **(
                {"checkpoints": [dataclasses.asdict(one) for one in recent_saves]}
                if recent_saves is not None
                else {}
            ),
        }
    )
    _warn(output, servers, unreachable, slow, passed_over)
    if output.as_json:
        return
    _show_rates(output, rates)
    _show_servers(output, servers)
    if recent_saves is not None:  # on a screen what matters most comes first
        show_datasets(output, servers, residencies or [])
        show_recent_saves(output, recent_saves)
        _show_saves(output, servers)
        _show_orders(output, servers)
    _show_lanes(output, servers, seen, answers_s)
    _show_disks(output, servers)
    _show_under_stores(output, servers)
    if recent_saves is None:
        _show_namespaces(output, servers)
        show_residencies(output, residencies or [])
        _show_saves(output, servers)
        _show_orders(output, servers)


def _warn(
    output: Output,
    servers: list[ServerStatus],
    unreachable: Sequence[str],
    slow: Mapping[str, float],
    passed_over: Mapping[tuple[str, str], int],
) -> None:
    for address in unreachable:
        output.warning(f"the server {address} can't be reached; the others stand in for it")
    for address, times in slow.items():
        output.warning(
            f"the server {address} takes {times:.0f} times as long as the others to answer: reads pass over it"
        )
    for (address, reason), clients in passed_over.items():
        output.warning(
            f"the server {address} is passed over by {clients} clients: {_REASONS.get(reason, reason)}"
        )
    for server in servers:
        copies = server.copies
        if copies is not None and copies.held < copies.wanted:
            output.warning(
                f"checkpoints that {server.address} has yet to upload are to have {copies.wanted} copies and have "
                f"{copies.held}: a server that held one is gone, and its log says why no other has taken it"
            )
        if server.out_of_service:
            output.warning(
                f"the disk of the server {server.address} is out of service: {server.out_of_service}. Reads go on from "
                "storage without being kept, and writes are refused; see to the disk, then restart the server"
            )
        for left_out, what in (
            (server.namespaces_left_out, "datasets that hold the least"),
            (server.orders_left_out, "orders of reading"),
        ):
            if left_out:
                output.warning(f"{left_out:,} {what} at the server {server.address} are not shown")


def _passed_over(servers: list[ServerStatus]) -> dict[tuple[str, str], int]:
    """By address, or id if that isn't known, and reason: how many clients ask a server after all others.

    Each tells all servers that it reads from: the largest number is the nearest.
    """
    addresses = {server.server_id: server.address for server in servers}
    found: dict[tuple[str, str], int] = {}
    for server in servers:
        for one in server.passed_over:
            key = (addresses.get(one.server_id, one.server_id), one.reason)
            found[key] = max(found.get(key, 0), one.clients)
    return dict(sorted(found.items()))


def _running_embedded_pool() -> Pool:
    """The embedded pool as it runs, without attaching to it: that would start it. Raises ServerUnavailable."""
    from torchcache.embedded import read_endpoint, running
    from torchcache.lanes.access import Access
    from torchcache.local_pool import default_root, wanted_lane
    from torchcache.pool import Pool
    from torchcache.pool.members import StaticMembers, parse_address

    root = default_root()
    found = [read_endpoint(folder) for folder in sorted(root.glob("server-*")) if running(folder)]
    addresses = [fields["control"] for fields in found if fields]
    if not addresses:
        raise ServerUnavailable(
            "no embedded pool runs here for these S3 settings; the first program to use one starts it"
        )
    endpoints = parse_address(",".join(addresses))
    return Pool(
        StaticMembers(endpoints=endpoints, access=Access(token_file=root / "token")), wanted_lane(None)
    )


def _show_rates(output: Output, rates: list[Rates]) -> None:
    def each_s(count: float) -> str:
        return f"{size_text(round(count))}/s"

    if rates:
        output.table(
            (
                "now",
                ">by flight",
                ">locally",
                ">hit rate",
                ">from storage",
                ">to storage",
                ">requests",
                ">evicted",
                ">hedged",
            ),
            [
                (
                    rate.address,
                    each_s(rate.flight_bytes),
                    each_s(rate.local_bytes),
                    "-" if rate.hit_rate is None else percent_text(rate.hit_rate),
                    each_s(rate.from_storage_bytes),
                    each_s(rate.to_storage_bytes),
                    f"{rate.requests:.0f}/s",
                    f"{rate.evicted_chunks:.0f}/s",
                    f"{rate.hedged_calls:.1f}/s",
                )
                for rate in rates
            ],
        )


def _show_servers(output: Output, servers: list[ServerStatus]) -> None:
    from torchcache.placement import Placement

    placement = Placement([s.server_id for s in servers], {s.server_id: s.weight for s in servers})
    shares = dict(zip(placement.members, map(float, placement.shares()), strict=True))
    output.table(
        (
            "server",
            "up",
            ">share",
            ">used",
            ">capacity",
            ">hits",
            ">hit rate",
            ">served",
            ">filling",
            ">to upload",
            ">corrupt",
            "store",
        ),
        [
            (
                s.address,
                duration_text(s.uptime_s),
                percent_text(shares[s.server_id]),
                size_text(s.used_bytes),
                size_text(s.capacity_bytes),
                f"{s.hits:,}",
                percent_text(s.hits / (s.hits + s.misses)) if s.hits + s.misses else "-",
                size_text(s.served_bytes),
                size_text(s.filling_bytes),
                size_text(s.upload_pending_bytes),
                f"{s.corrupt:,}",
                s.store_path,
            )
            for s in servers
        ],
    )


def _show_lanes(
    output: Output, servers: list[ServerStatus], seen: PoolStatistics, answers_s: dict[str, float | None]
) -> None:
    def answer_text(took_s: float | None) -> str:
        return "-" if took_s is None else f"{1e3 * took_s:.1f} ms"

    output.table(
        ("server", "lane from here", ">read locally", ">read by flight", ">answers in", "why not local"),
        [
            (
                s.address,
                seen.lanes.get(s.address, ""),
                size_text(s.local_bytes),
                size_text(s.served_bytes),
                answer_text(answers_s.get(s.address)),
                seen.lane_reasons.get(s.address, ""),
            )
            for s in servers
        ],
    )


def _show_disks(output: Output, servers: list[ServerStatus]) -> None:
    output.table(
        (
            "disk of",
            "state",
            ">errors",
            ">free",
            ">spare",
            ">dead",
            ">index",
            ">scrubbed",
            ">rounds",
            ">damaged, kept",
        ),
        [
            (
                s.address,
                Alert(f"out of service: {s.out_of_service}") if s.out_of_service else "in service",
                _alarming(s.disk_errors),
                size_text(s.free_bytes),
                size_text(s.spare_bytes),
                size_text(s.dead_bytes),
                size_text(s.overhead_bytes),
                size_text(s.scrubbed_bytes),
                f"{s.scrub_rounds:,}",
                _alarming(s.damaged_kept),
            )
            for s in servers
        ],
    )


def _alarming(count: int) -> str:
    return Alert(f"{count:,}") if count else "0"


def _show_under_stores(output: Output, servers: list[ServerStatus]) -> None:
    output.table(
        (
            "under-store",
            "URI",
            "server",
            ">reads",
            ">read",
            ">writes",
            ">written",
            ">other requests",
            ">retries",
        ),
        [
            (
                u.name,
                u.uri,
                s.address,
                f"{u.read_requests:,}",
                size_text(u.read_bytes),
                f"{u.write_requests:,}",
                size_text(u.write_bytes),
                f"{u.meta_requests:,}",
                f"{u.retries:,}",
            )
            for s in servers
            for u in s.under_stores
        ],
    )


def _show_namespaces(output: Output, servers: list[ServerStatus]) -> None:
    held = [
        (n.name, s.address, size_text(n.bytes), f"{n.chunks:,}", _notes(n))
        for s in servers
        for n in s.namespaces
    ]
    if held:
        output.table(("dataset or checkpoint", "server", ">bytes", ">chunks", "notes"), sorted(held))


def _show_saves(output: Output, servers: list[ServerStatus]) -> None:
    states = ("saving", "cached", "replicated", "durable", "failed", "copy")
    rows = [
        (
            s.address,
            *(f"{s.saves.get(state, 0):,}" for state in states[:-2]),
            _alarming(s.saves.get("failed", 0)),
            f"{s.saves.get('copy', 0):,}",
            size_text(s.upload_pending_bytes),
            duration_text(s.oldest_pending_s) if s.oldest_pending_s else "-",
            *_copies_texts(s.copies),
        )
        for s in servers
        if any(s.saves.values())
    ]
    if rows:
        output.table(
            (
                "checkpoints at",
                *(f">{state}" for state in states[:-1]),
                ">copies of others'",
                ">to upload",
                ">oldest waits",
                ">copies of these",
                ">made again",
                ">chunks mended",
            ),
            rows,
        )


def _copies_texts(copies: CopiesStatus | None) -> tuple[str, str, str]:
    """Those of what waits for its upload, those made again, and chunks mended; dashes if none are looked after."""
    if copies is None:
        return "-", "-", "-"
    held = f"{copies.held:,} of {copies.wanted:,}"
    is_short = copies.held < copies.wanted
    return Alert(held) if is_short else held, f"{copies.made:,}", f"{copies.mended_chunks:,}"


def _show_orders(output: Output, servers: list[ServerStatus]) -> None:
    told = [
        (
            o.namespace,
            s.address,
            f"{o.epoch:,}",
            f"{o.position:,} of {o.length:,}" if o.position >= 0 else "not begun",
            size_text(o.ahead_bytes),
            f"{o.coming_chunks:,}",
            size_text(o.fetched_bytes),
            o.order[:8],
        )
        for s in servers
        for o in s.orders
    ]
    if told:
        output.table(
            (
                "read by order",
                "server",
                ">epoch",
                ">samples read",
                ">ahead",
                ">coming",
                ">fetched ahead",
                "reader",
            ),
            sorted(told),
        )


def _notes(namespace: NamespaceStatus) -> str:
    policy = policy_text(
        pinned=namespace.pinned,
        priority=namespace.priority,
        quota_bytes=namespace.quota_bytes,
        ttl_s=namespace.ttl_s,
    )
    return ", ".join(filter(None, (policy, "not yet durable" if namespace.dirty else "")))
