"""`make bench`: measures section by section, prints a table each, and keeps the figures as JSON.

`--report` makes the tables and plots of docs/benchmarks.md from that JSON; alone it measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from benchmarks.findings import Findings, Scale
from benchmarks.places import home, memory_folder, one_pool_for_all
from benchmarks.report import RESULTS, update_document
from benchmarks.rounds import machine
from benchmarks.tables import show

SECTIONS: Final = {
    "local": "local_lane",
    "flight": "flight_lane",
    "tls": "tls_lane",
    "loader": "loaders",
    "connections": "idle_connections",
    "slow_server": "slow_server",
    "scaling": "scaling",
    "mlperf": "mlperf",
    "checkpoint": "checkpoints",
    "llama": "llama",
    "adapters": "adapters",
    "s3_checkpoint": "s3_checkpoints",
    "weights": "weights",
    "cold": "cold_reads",
    "manifest": "manifests",
    "half": "half_cached",
    "prefetch": "next_epochs",
    "order": "local_shares",
    "placement": "placement",
    "rivals": "rivals",
    "verification": "verification",
    "recycling": "recycling",
    "eviction": "eviction",
    "start_up": "start_up",
}
"""Name of each section, and the module whose `measure` it is; loaded when it runs."""


def section(name: str) -> Callable[[Scale], Findings]:
    """What measures a section."""
    return cast("Callable[[Scale], Findings]", import_module(f"benchmarks.{SECTIONS[name]}").measure)


def run(names: Sequence[str], scale: Scale) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures the sections one after the other, prints each as it comes, and gives it as plain values."""
    with memory_folder() as folder, home(folder), ExitStack() as closing:
        if scale.tiny:
            closing.enter_context(one_pool_for_all(folder / "pool"))
        for name in names:
            findings = section(name)(scale)
            show(findings, scale.rounds)
            yield name, findings.as_json(scale.rounds)


def keep(path: Path, found: dict[str, Any]) -> None:
    """Writes the sections into the file; others that it has stay."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **found}, indent=1) + "\n")


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no such section: {', '.join(unknown)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", type=_names, help=f"sections to measure, by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=15, help="rounds each contender runs (15)")
    parser.add_argument("--tiny", action="store_true", help="one small round, to see that it runs")
    parser.add_argument(
        "--json", type=Path, help="keep the figures in this file; sections not measured stay in it"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help=f"make docs/benchmarks.md and its plots anew from {RESULTS.name}",
    )
    args = parser.parse_args()
    if args.only or args.json or not args.report:
        scale = Scale(rounds=1 if args.tiny else args.rounds, tiny=args.tiny)
        for name, figures in run(args.only or list(SECTIONS), scale):
            if args.json:
                keep(args.json, {name: figures})
        print("; ".join(f"{name} {value}" for name, value in machine().items()))
    if args.report:
        update_document()


if __name__ == "__main__":
    main()
