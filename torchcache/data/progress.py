"""The progress bar of staging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchcache.data.samples import OnProgress


@contextmanager
def progress_bar(what: str, samples: int, total_bytes: int | None) -> Iterator[OnProgress]:
    """A bar on stderr: of bytes if their total is known, else of samples with the bytes beside."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}")]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        of = f" of {decimal(total_bytes)}" if total_bytes is not None else ""
        task = bar.add_task(what, total=samples if total_bytes is None else total_bytes, done="")
        count = size = 0

        def advance(more_samples: int, more_bytes: int) -> None:
            nonlocal count, size
            count, size = count + more_samples, size + more_bytes
            done = f"{count:,}/{samples:,} samples, {decimal(size)}{of}"
            bar.update(task, completed=count if total_bytes is None else size, done=done)

        yield advance
