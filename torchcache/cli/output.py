"""Printing, for people or for machines."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from torchcache.errors import TorchCacheError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_PIPE_COLUMNS = 500
"""Width where no terminal sets one: nothing is cut off or wrapped."""


class Alert(str):
    """A cell of a table that must not be overlooked."""

    __slots__ = ()


Advance = Callable[[int, int], None]
"""(items, bytes) just done."""


class Output:
    """Results on stdout, as text or as one JSON document; progress and errors on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.one_line = False  # for each document: there are several
        self._gathered: list[RenderableType] | None = None

    @contextlib.contextmanager
    def gather(self) -> Iterator[list[RenderableType]]:
        """What the block would print for people goes into the list that it gets, warnings too."""
        self._gathered = []
        try:
            yield self._gathered
        finally:
            self._gathered = None

    def document(self, content: Mapping[str, Any]) -> None:
        """Prints `content` if machines listen."""
        if self.as_json:
            indent = None if self.one_line else 2
            click.echo(json.dumps(content, indent=indent, ensure_ascii=False))

    def text(self, line: str) -> None:
        """Prints a line if people listen."""
        if self._gathered is not None:
            self._gathered.append(_line(line))
        elif not self.as_json:
            click.echo(line)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
    ) -> None:
        """Prints a table if people listen. Columns whose name starts with ">" are numbers."""
        if self.as_json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table: Table = Table(
            title=title,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
            expand=False,
        )
        for name in columns:
            table.add_column(
                name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(cell, style="bold red" if isinstance(cell, Alert) else "") for cell in row))
        if self._gathered is not None:
            self._gathered.append(table)
            return
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False).print(
            table
        )

    def warning(self, line: str) -> None:
        """Prints a line on stderr, for everybody."""
        if self._gathered is not None:
            self._gathered.append(_line(f"torchcache: {line}", style="bold red"))
            return
        click.echo(f"torchcache: {line}", err=True)

    def error(self, error: TorchCacheError) -> None:
        """Prints an error: a line on stderr, and for machines a document on stdout."""
        click.echo(f"torchcache: {' '.join(str(error).split())}", err=True)
        self.document(
            {
                "error": type(error).__name__,
                "message": error.message,
                "object": error.object,
                "server": error.server,
                "request_id": error.request_id,
            }
        )

    @contextlib.contextmanager
    def progress(self, what: str, *, items: int, total_bytes: int) -> Iterator[Advance]:
        """A progress bar on stderr while the block runs, lines there where it is no terminal.

        The block calls what it is given.
        """
        if not sys.stderr.isatty():
            from torchcache.pool.progress_lines import ProgressLines

            yield ProgressLines(what, items, lambda line: click.echo(line, err=True))
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        items_column = TextColumn("{task.fields[done]:,}/{task.fields[items]:,}")
        columns = (TextColumn("{task.description}"), BarColumn(), items_column, DownloadColumn(), Speed())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total_bytes, items=items, done=0)
            done = 0

            def advance(items_done: int, bytes_done: int) -> None:
                nonlocal done
                done += items_done
                progress.update(task, advance=bytes_done, done=done)

            yield advance


def _line(line: str, *, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(line, style=style)


def size_text(size_bytes: int) -> str:
    """Bytes for people, in powers of 1000: "25.0 GB"."""
    from rich.filesize import decimal

    return decimal(size_bytes)


def percent_text(fraction: float) -> str:
    """A share for people, that says 100 % only of all and 0 % only of nothing."""
    percent = 100 * fraction
    if 0 < percent < 1:
        return "<1 %"
    return ">99 %" if 99 < percent < 100 else f"{percent:.0f} %"


def duration_text(seconds: float) -> str:
    """A time for people: its two largest units."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return (
        f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    )


def policy_text(*, pinned: bool, priority: int, quota_bytes: int | None, ttl_s: float | None) -> str:
    """What a user asked of a dataset's place in the pool: "pinned, quota 100.0 GB"; empty for nothing."""
    notes = (
        "pinned" if pinned else "",
        f"priority {priority}" if priority else "",
        f"quota {size_text(quota_bytes)}" if quota_bytes else "",
        f"dropped when unused for {duration_text(ttl_s)}" if ttl_s else "",
    )
    return ", ".join(filter(None, notes))
