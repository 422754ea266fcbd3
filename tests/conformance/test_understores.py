"""The under-stores against their contract: POSIX, S3 as SeaweedFS speaks it, S3 as moto does, with either root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from torchcache_server.understore import UnderStore, create
from torchcache_server.understore.s3 import S3UnderStore

from examples.seaweedfs import SeaweedFS, environment
from tests.conformance.understore import RootsAreNotMade, UnderStoreConformance, WritersExcludeEachOther


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The URL of moto's S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class TestPosix(UnderStoreConformance, WritersExcludeEachOther, RootsAreNotMade):
    copies_itself = False

    @pytest.fixture
    def under_store(self, tmp_path: Path) -> UnderStore:
        return create("files", f"file://{tmp_path}")

    @pytest.fixture
    def rootless(self, tmp_path: Path) -> tuple[UnderStore, str]:
        return create("files", f"file://{tmp_path}/nowhere"), "a/"


class TestSeaweedFS(UnderStoreConformance, WritersExcludeEachOther):
    # Its CompleteMultipartUpload checks the condition, but not atomically: a third of such races have two winners.
    exclusive_bytes = 5_000_000

    @pytest.fixture
    def under_store(self, s3: SeaweedFS) -> Iterator[UnderStore]:
        under_store = create("s3", f"s3://{s3.make_bucket()}/some/prefix")
        yield under_store
        under_store.close()

    @pytest.fixture
    def rootless(self, s3: SeaweedFS) -> tuple[UnderStore, str]:
        return create("s3", "s3://no-such-bucket/prefix"), "a/"


class TestMotoFromTheTop(UnderStoreConformance, RootsAreNotMade):
    """The root s3://, where keys begin with the bucket. moto checks conditions, but not atomically."""

    @pytest.fixture
    def under_store(self, moto: str) -> Iterator[UnderStore]:
        keys = {"AWS_ACCESS_KEY_ID": "moto", "AWS_SECRET_ACCESS_KEY": "moto"}
        with environment({"AWS_ENDPOINT_URL": moto, "AWS_REGION": "us-east-1"}):
            with environment(keys):
                boto3.client("s3").create_bucket(Bucket="bucket")
            under_store = S3UnderStore("s3", "s3://", credentials=keys)
            yield under_store
        under_store.close()

    @pytest.fixture
    def folder(self) -> str:
        return f"bucket/folder-{next(self._folders)}/"

    @pytest.fixture
    def rootless(self, under_store: UnderStore) -> tuple[UnderStore, str]:
        return under_store, "no-such-bucket/"
