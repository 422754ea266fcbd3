"""`make bench`: runs every comparison, prints a table, and writes the figures as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import eviction, recycling, start_up
from benchmarks.flight_lane import SHAPES, TINY, Comparison, compare
from benchmarks.rounds import Result, machine
from benchmarks.verification import Cost, costs


def show(comparisons: list[Comparison], rounds: int) -> None:
    table = Table(title=f"Flight lane, medians of {rounds} alternating rounds", title_style="bold")
    for name in ("what", "contender", "ms", "fastest", "slowest", "GB/s", "ours / it"):
        table.add_column(name, justify="left" if name in ("what", "contender") else "right")
    for c in comparisons:
        rows = (
            (c.shape, c.ours, ""),
            ("", c.bare_one, f"{c.ratio:.2f}"),
            ("", c.bare_views, f"{c.ratio_to_views:.2f}"),
        )
        for shape, result, ratio in rows:
            times = (f"{t * 1e3:.1f}" for t in (result.median_s, result.fastest_s, result.slowest_s))
            table.add_row(shape, result.name, *times, f"{result.gigabytes_per_s:.2f}", ratio)
        table.add_section()
    Console().print(table)


def show_costs(found: list[Cost], rounds: int) -> None:
    title = f"Verification on the flight lane, medians of {rounds} alternating rounds"
    table = Table(title=title, title_style="bold")
    for name in ("what", "verified, ms", "not verified, ms", "costs"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for cost in found:
        times = (f"{r.median_s * 1e3:.1f}" for r in (cost.verified, cost.unverified))
        table.add_row(cost.shape, *times, f"{cost.share:.1%}")
    Console().print(table)


def show_recycling(found: dict[str, Result], rounds: int) -> None:
    title = f"Chunks of 4 MiB into the store, and gone again, medians of {rounds} alternating rounds"
    table = Table(title=title, title_style="bold")
    for name in ("into", "ms", "GB/s"):
        table.add_column(name, justify="left" if name == "into" else "right")
    for result in found.values():
        table.add_row(result.name, f"{result.median_s * 1e3:.1f}", f"{result.gigabytes_per_s:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="one small round, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    rounds = 1 if args.tiny else args.rounds
    comparisons = [compare(shape, rounds=rounds) for shape in (TINY if args.tiny else SHAPES)]
    show(comparisons, rounds)
    verification = costs(rounds=rounds, tiny=args.tiny)
    show_costs(verification, rounds)
    writes = recycling.compare(rounds=rounds, chunks=recycling.TINY_CHUNKS if args.tiny else recycling.CHUNKS)
    show_recycling(writes, rounds)
    rates = eviction.rates(*(eviction.TINY if args.tiny else eviction.SHAPE))
    eviction.show(rates)
    starts = start_up.start_ups([start_up.TINY if args.tiny else start_up.MILLION], None)
    start_up.show(starts)
    Console().print("; ".join(f"{k} {v}" for k, v in machine().items()), style="dim")
    if args.json:
        figures = {
            "machine": machine(),
            "flight_lane": [
                {**asdict(c), "ratio": c.ratio, "ratio_to_views": c.ratio_to_views} for c in comparisons
            ],
            "verification": [{**asdict(c), "share": c.share} for c in verification],
            "recycling": {name: asdict(result) for name, result in writes.items()},
            "eviction": [asdict(rate) for rate in rates],
            "start_up": [asdict(s) for s in starts],
        }
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
