"""`python -m torchcache_server.process.doctor`: checks stores while no server has them, and repairs them if told to.

Exit codes: 0 sound, or all repaired; 1 damage is left; 2 a store can't be checked, or is in use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from torchcache_server.process.examination import Advance, Report, examine

SOUND: Final = 0
DAMAGED: Final = 1
UNUSABLE: Final = 2


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    "stores",
    metavar="DIR",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of a store. Repeatable.",
)
@click.option("--repair", is_flag=True, help="Repair what can be. Nothing that must be kept is removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(stores: tuple[Path, ...], *, repair: bool, as_json: bool) -> None:
    """Reads every byte of stores that no server has open, and says what is damaged."""
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(message)s")
    reports = [examine(store.expanduser().absolute(), repair=repair, progress=_progress) for store in stores]
    if as_json:
        click.echo(json.dumps({"stores": [_document(report) for report in reports]}, indent=2))
    for report in reports:
        if report.unusable:
            click.echo(f"torchcache: {report.unusable}", err=True)
        elif not as_json:
            _show(report, repair=repair)
    sys.exit(max(map(_code, reports)))


def _code(report: Report) -> int:
    return UNUSABLE if report.unusable else DAMAGED if report.left else SOUND


def _document(report: Report) -> dict[str, Any]:
    if report.unusable:
        return {"store": report.store, "error": report.unusable}
    return {
        "store": report.store,
        "sound": not report.left,
        "segments": report.segments,
        "records": report.records,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "findings": [
            {
                "kind": finding.kind,
                "path": finding.path,
                "what": finding.what,
                "consequence": finding.consequence,
                "repair": finding.repair,
                "damage": finding.is_damage,
                "repaired": finding in report.repaired,
                "error": report.errors.get(finding, ""),
            }
            for finding in report.findings
        ],
    }


def _show(report: Report, *, repair: bool) -> None:
    for finding in report.findings:
        click.echo(f"{'damage' if finding.is_damage else 'remark'}: {finding.path}: {finding.what}")
        click.echo(f"    {finding.consequence}")
        if finding in report.errors:
            click.echo(f"    not repaired: {report.errors[finding]}")
        elif finding in report.repaired:
            click.echo(f"    repaired: {finding.repair}")
        elif finding.repair and not repair:
            click.echo(f"    with --repair: {finding.repair}")
    left = report.left
    state = f"{len(left)} damages" + (" are left" if repair else "") if left else "sound"
    speed = report.bytes / report.seconds / 1e9 if report.seconds else 0.0
    click.echo(
        f"{report.store}: {state}; {report.segments:,} segments, {report.records:,} records, "
        f"{report.bytes / 1e9:.1f} GB read in {report.seconds:.1f} s ({speed:.1f} GB/s)"
    )


@contextlib.contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Advance]:
    """A progress bar on stderr while the block runs, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda count: progress.advance(task, count)


if __name__ == "__main__":
    main(prog_name="torchcache doctor")
