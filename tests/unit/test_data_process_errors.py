"""What on_error="skip" leaves out is one sample's matter: what the process lacks, or can't reach, ends the epoch."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset, CachedIterableDataset
from torchcache.errors import IntegrityError, ServerUnavailable

__all__ = ["pool"]


def direct(kind: type[Exception], *arguments: Any) -> Callable[[], Any]:
    def fail() -> Any:
        raise kind(*arguments)

    return fail


def caused() -> Any:
    try:
        raise OSError(errno.EMFILE, "Too many open files")
    except OSError as error:
        raise ValueError("no image") from error


def behind() -> Any:
    try:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    except OSError:
        raise LookupError("http://labels/7")  # noqa: B904 - as libraries do


def behind_a_server() -> Any:
    try:
        raise ServerUnavailable("the pool is away")
    except ServerUnavailable:
        raise LookupError("labels")  # noqa: B904


def hidden() -> Any:
    try:
        raise TimeoutError("the fast way took too long")
    except TimeoutError:
        raise ValueError("no image") from None


def out_of_memory() -> Any:
    return torch.empty(1 << 50, dtype=torch.uint8)


def no_threads() -> Any:
    raise RuntimeError("can't start new thread")


OF_THE_PROCESS: dict[str, Callable[[], Any]] = {
    "memory": direct(MemoryError, "no room"),
    "files": direct(OSError, errno.EMFILE, "Too many open files"),
    "disk full": direct(OSError, errno.ENOSPC, "No space left on device"),
    "disk fails": direct(OSError, errno.EIO, "Input/output error"),
    "processes": direct(BlockingIOError, errno.EAGAIN, "Resource temporarily unavailable"),
    "network": direct(OSError, errno.ENETUNREACH, "Network is unreachable"),
    "timeout": direct(TimeoutError, "timed out"),
    "reset": direct(ConnectionResetError, errno.ECONNRESET, "Connection reset by peer"),
    "name": direct(socket.gaierror, socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "tensor": out_of_memory,
    "thread": no_threads,
    "caused": caused,
    "behind": behind,
    "behind a server": behind_a_server,
    "pool": direct(ServerUnavailable, "the pool is away"),
}

OF_ONE_SAMPLE: dict[str, Callable[[], Any]] = {
    "value": direct(ValueError, "bad"),
    "key": direct(KeyError, "label"),
    "gone": direct(FileNotFoundError, errno.ENOENT, "No such file"),
    "refused": direct(PermissionError, errno.EACCES, "Permission denied"),
    "image": direct(OSError, "image file is truncated"),
    "other runtime": direct(RuntimeError, "stack expects each tensor to be equal size"),
    "damaged": direct(IntegrityError, "damaged"),
    "hidden": hidden,
}


def third(fail: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda number: fail() if number == 2 else number


def mapped(pool: SamplePool, fail: Callable[[], Any]) -> CachedDataset:
    return CachedDataset(
        range(4),
        name="n",
        transform=third(fail),
        on_error="skip",
        pool=pool,  # type: ignore[arg-type]
    )


class Four(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(4))


def iterable(pool: SamplePool, fail: Callable[[], Any]) -> CachedIterableDataset:
    return CachedIterableDataset(
        Four(),
        name="i",
        transform=third(fail),
        on_error="skip",
        pool=pool,  # type: ignore[arg-type]
    )


@pytest.fixture
def both(
    pool: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Ways to read 0 to 3, of which 2 fails."""
    monkeypatch.setattr("torchcache.data.iterable.connect", lambda given: given)
    return lambda fail: {
        "map": lambda: mapped(pool, fail).__getitems__([0, 1, 2, 3]),
        "iterable": lambda: list(iterable(pool, fail)),
    }


@pytest.mark.parametrize("name", OF_THE_PROCESS)
def test_of_the_process_is_raised(both: Any, name: str) -> None:
    for read in both(OF_THE_PROCESS[name]).values():
        with pytest.raises(Exception, match=r".") as caught:
            read()
        assert any("raised for sample 2 of " in note for note in caught.value.__notes__)


@pytest.mark.parametrize("name", OF_ONE_SAMPLE)
def test_of_one_sample_is_skipped(both: Any, name: str) -> None:
    for read in both(OF_ONE_SAMPLE[name]).values():
        assert read() == [0, 1, 3]


def test_what_was_being_handled_already_caused_nothing(both: Any) -> None:
    """An epoch may be read where the user has just caught what ended another."""
    for read in both(direct(ValueError, "bad")).values():
        try:
            raise MemoryError
        except MemoryError:
            assert read() == [0, 1, 3]


@pytest.mark.parametrize("of_the_process", [True, False])
def test_staging_of_computed_samples(pool: SamplePool, of_the_process: bool) -> None:
    """Nor is it one missing sample of a report."""

    class Some:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            if index == 2:
                raise MemoryError if of_the_process else ValueError
            return index

    dataset = CachedDataset(Some(), name="n", pool=pool)  # type: ignore[arg-type]
    if of_the_process:
        with pytest.raises(MemoryError):
            dataset.stage(progress=False, on_missing="report")
    else:
        assert len(dataset.stage(progress=False, on_missing="report").missing) == 1


def test_an_interrupt_is_no_error_to_skip(pool: SamplePool) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped(pool, interrupted).__getitems__([0, 1, 2])
