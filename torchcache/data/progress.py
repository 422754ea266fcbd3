"""The progress of what takes long: staging, and listing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from torchcache.data.samples import OnProgress
from torchcache.pool.progress_lines import ProgressLines

_log = logging.getLogger("torchcache")

SHOWN_AFTER_S: Final = 2.0
LOGGED_EVERY_S: Final = 10.0


@contextmanager
def progress_bar(
    what: str, total: int, total_bytes: int | None, noun: str = "samples"
) -> Iterator[OnProgress]:
    """A bar on stderr: of bytes if their total is known, else of the `total` samples, or `noun`, with bytes beside.

    Where stderr is no terminal, lines of the log "torchcache", at level INFO.
    """
    if not sys.stderr.isatty():
        yield ProgressLines(what, total, _log.info)
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}")]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        of = f" of {decimal(total_bytes)}" if total_bytes is not None else ""
        task = bar.add_task(what, total=total if total_bytes is None else total_bytes, done="")
        count = size = 0

        def advance(more_samples: int, more_bytes: int) -> None:
            nonlocal count, size
            count, size = count + more_samples, size + more_bytes
            done = f"{count:,}/{total:,} {noun}, {decimal(size)}{of}"
            bar.update(task, completed=count if total_bytes is None else size, done=done)

        yield advance


@contextmanager
def listing_progress(uri: str) -> Iterator[Callable[[int], None]]:
    """Takes how many objects have been listed so far. Shows them once it takes long: on a terminal, else in the log."""
    shown_at = time.monotonic() + SHOWN_AFTER_S
    on_terminal = sys.stderr.isatty()
    shown = False

    def advance(count: int) -> None:
        nonlocal shown_at, shown
        now = time.monotonic()
        if now < shown_at:
            return
        shown = True
        if on_terminal:
            sys.stderr.write(f"\rlisting {uri}: {count:,} objects")
            sys.stderr.flush()
            shown_at = now + 0.5
        else:
            _log.info("listing %s: %d objects so far", uri, count)
            shown_at = now + LOGGED_EVERY_S

    try:
        yield advance
    finally:
        if shown and on_terminal:
            sys.stderr.write("\n")
