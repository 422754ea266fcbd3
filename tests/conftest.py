"""Fixtures shared by all tests: a real S3 server, a home of its own for every test, and what may not be left behind."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from botocore.loaders import create_loader

from examples.seaweedfs import SeaweedFS, environment
from torchcache.lanes.connections import connections, grpc_threads

# A slow machine is no failure, and a run that passed passes again: --hypothesis-profile=search looks for new examples.
hypothesis.settings.register_profile("torchcache", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("torchcache")

_ORDER = ("e2e", "integration", "hostile", "crash", "unit", "conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork, by their name or by their mark, go first, then those of whole programs.

    gRPC servers that other tests run in their own process may outlive them by a while, and a fork beside gRPC that
    isn't ours is refused.
    """
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    folder = item.path.parent.name
    forks = "fork" in item.nodeid or item.get_closest_marker("forks") is not None
    return -1 if forks else _ORDER.index(folder) if folder in _ORDER else len(_ORDER)


_numbers = itertools.count()

GRPC_ENDS_S = 20.0
"""What the gRPC of an earlier test may take to end."""

_staying: set[str] = set()
"""Threads of gRPC's that didn't end, and aren't waited for again."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Loaders fork, so a test of the whole finds no gRPC but the pools' own in its process.

    Whoever is done first takes over others' tests, behind ones that had gRPC clients and servers here.
    """
    if item.path.parent.name == "e2e" and not connections._open:
        until = time.monotonic() + GRPC_ENDS_S
        while (left := grpc_threads().keys() - _staying) and time.monotonic() < until:
            gc.collect()  # an error that was caught may hold a call, and that its channel
            time.sleep(0.05)
        _staying.update(left)


_NO_ACCOUNT = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session", autouse=True)
def no_account() -> Iterator[None]:
    """No test sees the AWS account or the torchcache settings of whoever runs it."""
    hidden = {name: None for name in os.environ if name.startswith(("AWS_", "TORCHCACHE_"))}
    with environment({**hidden, **_NO_ACCOUNT}):
        yield


@pytest.fixture(scope="session", autouse=True)
def models_of_botocore() -> Iterator[None]:
    """botocore reads its models of S3 for each of its sessions anew, in a tenth of a second: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", functools.cache(create_loader))
        yield


@pytest.fixture(scope="session", autouse=True)
def patient_forks() -> Iterator[None]:
    """gRPC's threads may be kept from ending for longer than who trains would wait for a fork.

    A loader's iterator that only the garbage collector finds waits so long for workers that can't end by themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
        patch.setattr("torchcache.lanes.connections.THREAD_WAIT_S", GRPC_ENDS_S)
        patch.setattr(connections, "_patience_s", GRPC_ENDS_S)
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One SeaweedFS for the whole run."""
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3(s3_server: SeaweedFS) -> Iterator[SeaweedFS]:
    """The real S3 server, with the AWS_* variables set so that boto3 and torchcache find it.

    Buckets made in a test go with it.
    """
    before = len(s3_server.buckets)
    with environment(s3_server.environment()):
        yield s3_server
    s3_server.remove_buckets(before)


@pytest.fixture
def no_hedges(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that count who was asked for what: a machine that is busy makes a server late, and another is asked."""
    monkeypatch.setattr("torchcache.pool.health.HEDGE_LEAST_S", 3600.0)
    monkeypatch.setattr("torchcache.pool.health.UNKNOWN_S", 3600.0)


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apart, and numbered by us: pytest looks through all folders that there are for each that it numbers."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def home(homes: Path) -> Iterator[Path]:
    """A TORCHCACHE_HOME of the test's own."""
    folder = homes / str(next(_numbers))
    folder.mkdir(mode=0o700)
    with environment({"TORCHCACHE_HOME": str(folder)}):
        yield folder
