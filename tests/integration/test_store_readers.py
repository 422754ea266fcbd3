"""Segments become others while somebody looks at them: never those. Readers in other processes, and clients' views."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.integration.mapping_reader_child import Job
from tests.integration.pool_server import Dataset, PoolServer
from tests.integration.store_process_parts import Child

MIB = 1 << 20
ANSWER_S = 60.0
SIZES = [3 * MIB + 77] * 10


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    """One that holds about one of the two datasets: to read them by turns recycles all there is."""
    with PoolServer(tmp_path, capacity="48MiB") as server:
        yield server


@pytest.fixture
def datasets(server: PoolServer) -> list[Dataset]:
    return [Dataset(server, name, SIZES) for name in ("a", "b")]


def read(server: PoolServer, datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.read(server.pool)


def reader(server: PoolServer, *, takes_locks: bool) -> Child:
    job = Job(store=str(server.store), takes_locks=takes_locks)
    return Child("tests.integration.mapping_reader_child", asdict(job))


def test_what_a_reader_has_mapped_never_changes(server: PoolServer, datasets: list[Dataset]) -> None:
    """I1: a reader that takes the locks sees what it saw, over many rounds in which the rest is recycled."""
    read(server, datasets)
    records = 0
    with closing(reader(server, takes_locks=True)) as child:
        for _ in range(6):
            records += int(child.ask("hold", ANSWER_S)["records"])
            read(server, datasets)
            assert child.ask("compare", ANSWER_S) == {"changed": 0}
            child.ask("release", ANSWER_S)
    assert records
    assert server.status.recycled_segments


def test_without_its_lock_it_would_change(server: PoolServer, datasets: list[Dataset]) -> None:
    """What the test above shows is the lock's doing: files are recycled under a reader that takes none."""
    read(server, datasets)
    with closing(reader(server, takes_locks=False)) as child:
        for _ in range(20):
            child.ask("hold", ANSWER_S)
            read(server, datasets)
            if child.ask("compare", ANSWER_S)["changed"]:
                return
            child.ask("release", ANSWER_S)
    pytest.fail("no file was recycled under the reader")


def test_a_reader_that_was_killed_holds_nothing(server: PoolServer, datasets: list[Dataset]) -> None:
    """F28, I5: its files are recycled like any other."""
    read(server, datasets)
    for _ in range(3):
        with closing(reader(server, takes_locks=True)) as child:
            child.ask("hold", ANSWER_S)
    read(server, datasets)
    before = server.status.recycled_segments
    for _ in range(20):
        read(server, datasets)
        if server.status.recycled_segments > before:
            break
    else:
        pytest.fail("nothing is recycled any more")
