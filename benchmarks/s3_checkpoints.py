"""Checkpoints whose home is S3: ours beside s3torchconnector's writer and reader, against the same server."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Final

import torch.distributed.checkpoint as dcp

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import memory_folder
from benchmarks.rounds import alternate
from benchmarks.savers import Ours
from benchmarks.states import check, cleared, large_state, size_of
from examples.seaweedfs import SeaweedFS, environment

OURS: Final = "torchcache"
WRITER: Final = "s3torchconnector, save"
READER: Final = "s3torchconnector, load"
_REGION: Final = "us-east-1"

warnings.filterwarnings(
    "ignore", "Detected an existing checkpoint", UserWarning
)  # it is meant to be replaced


def measure(scale: Scale) -> Findings:
    """How long training stands still for a save, and how long a load takes while the pool holds what was saved."""
    state = large_state(3, 1 << 16) if scale.tiny else large_state(52, 8 << 20)
    into = cleared(state)
    what = f"{size_of(state) / 1e9:.2f} GB"
    with ExitStack() as closing:
        root = closing.enter_context(memory_folder())
        server = closing.enter_context(SeaweedFS(root / "s3"))
        closing.enter_context(environment(server.environment()))
        bucket = server.make_bucket()
        ours = closing.enter_context(Ours(root / "ours", state, into, home=f"s3://{bucket}/ours"))
        writers: dict[str, Callable[[], int]] = {OURS: ours.begin_async}
        readers: dict[str, Callable[[], int]] = {OURS: ours.load}
        if find_spec("s3torchconnector") and find_spec("tenacity"):
            path = f"s3://{bucket}/theirs"
            writers[WRITER] = lambda: _save(state, path)
            readers[READER] = lambda: _load(into, path)
        stops = alternate(writers, after={OURS: ours.end_async}, rounds=scale.rounds)
        loads = alternate(readers, rounds=scale.rounds)
        ours.load()
        check(into, state)
    rows = [
        _row(f"stop of training for a save of {what} to S3", stops, WRITER, 10.0),
        _row(f"load of {what}, still in the pool", loads, READER, 5.0),
    ]
    return Findings(
        title="Checkpoints in S3",
        rows=rows,
        contenders={"stop of training": list(stops.values()), "load": list(loads.values())},
    )


def _client() -> Any:
    from s3torchconnector import S3ClientConfig

    return S3ClientConfig(force_path_style=True)


def _save(state: Any, path: str) -> int:
    from s3torchconnector.dcp import S3StorageWriter

    writer = S3StorageWriter(_REGION, path, s3client_config=_client(), overwrite=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return size_of(state)


def _load(into: Any, path: str) -> int:
    from s3torchconnector.dcp import S3StorageReader

    dcp.load(into, storage_reader=S3StorageReader(_REGION, path, s3client_config=_client()), no_dist=True)
    return size_of(into)


def _row(what: str, results: Any, against: str, goal: float) -> Row:
    bare = results[against].median_s * 1e3 if against in results else None
    ours = results[OURS].median_s * 1e3
    return Row(what=what, unit="ms", ours=ours, bare=bare, against=against, goal=Goal(bound=goal))
