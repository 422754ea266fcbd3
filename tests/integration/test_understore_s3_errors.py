"""What a user is told when S3 can't be used, by a real S3 server: each message says what is wrong and what to do."""

from __future__ import annotations

import socket
import time

import pytest
from torchcache_server.understore.retry import RetryPolicy
from torchcache_server.understore.s3 import S3UnderStore

from examples.seaweedfs import SeaweedFS, environment
from torchcache.errors import ConfigurationError, ObjectChanged, ObjectNotFound, ServerUnavailable
from torchcache.model import ByteRange, ObjectInfo

NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    name = s3.make_bucket()
    s3.client.put_object(Bucket=name, Key="a", Body=b"data")
    return name


def soon() -> float:
    return time.monotonic() + 60


def stat(under_store: S3UnderStore, key: str) -> ObjectInfo:
    try:
        return under_store.stat(key, deadline=soon())
    finally:
        under_store.close()


def test_a_wrong_bucket(s3: SeaweedFS) -> None:
    said = rf"no bucket 'no-such-bucket' at {s3.endpoint_url}.*check the bucket's name and AWS_ENDPOINT_URL"
    with pytest.raises(ObjectNotFound, match=said):
        stat(S3UnderStore("s3", "s3://"), "no-such-bucket/a")


def test_a_missing_object(bucket: str) -> None:
    with pytest.raises(ObjectNotFound, match=f"there is no s3://{bucket}/b; check the name") as caught:
        stat(S3UnderStore("s3", "s3://"), f"{bucket}/b")
    assert caught.value.object == f"s3://{bucket}/b"


def test_an_impossible_bucket() -> None:
    with pytest.raises(ConfigurationError, match=r"'My Bucket!' .* can't be the name of an S3 bucket"):
        stat(S3UnderStore("s3", "s3://"), "My Bucket!/a")


def test_no_credentials(bucket: str) -> None:
    said = f"can't stat s3://{bucket}/a: no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET"
    with environment(NO_KEYS), pytest.raises(ConfigurationError, match=said):
        stat(S3UnderStore("s3", "s3://"), f"{bucket}/a")


def test_a_wrong_secret(bucket: str, s3: SeaweedFS) -> None:
    keys = {**s3.environment(), "AWS_SECRET_ACCESS_KEY": "canary-secret"}
    under_store = S3UnderStore("s3", "s3://", credentials=keys)
    with pytest.raises(ConfigurationError, match=r"secret key is wrong; check AWS_ACCESS_KEY_ID") as caught:
        under_store.list(f"{bucket}/", start_after="", limit=10, deadline=soon())
    under_store.close()
    assert "canary-secret" not in repr(caught.value)


def test_an_unknown_access_key(bucket: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "canary-secret"}
    with pytest.raises(ConfigurationError, match=r"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        stat(S3UnderStore("s3", "s3://", credentials=keys), f"{bucket}/a")


def test_new_credentials_are_used_at_once(bucket: str, s3: SeaweedFS) -> None:
    wrong = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "wrong"}
    under_store = S3UnderStore("s3", f"s3://{bucket}", credentials=wrong)
    with pytest.raises(ConfigurationError):
        under_store.stat("a", deadline=soon())
    under_store.set_credentials(s3.environment())
    assert under_store.stat("a", deadline=soon()).size == 4
    under_store.set_credentials({})
    assert stat(under_store, "a").size == 4


def test_credentials_that_appear_later_are_found(bucket: str) -> None:
    under_store = S3UnderStore("s3", f"s3://{bucket}")
    with environment(NO_KEYS), pytest.raises(ConfigurationError, match="no S3 credentials"):
        under_store.stat("a", deadline=soon())
    assert stat(under_store, "a").size == 4


def test_nobody_listens_at_the_endpoint(s3: SeaweedFS) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound, not listening: nobody else gets the port.
        endpoint = f"http://user:canary-secret@127.0.0.1:{taken.getsockname()[1]}"
        shown = endpoint.replace("user:canary-secret@", "")
        with environment({"AWS_ENDPOINT_URL": endpoint}):
            under_store = S3UnderStore("s3", "s3://bucket", policy=RetryPolicy(tries=2, first_s=0.001))
            with pytest.raises(
                ServerUnavailable, match=f"{shown} can't be reached; check AWS_ENDPOINT"
            ) as caught:
                stat(under_store, "a")
    assert "canary-secret" not in repr(caught.value)


def test_an_endpoint_that_is_none(s3: SeaweedFS) -> None:
    with (
        environment({"AWS_ENDPOINT_URL": "not a url"}),
        pytest.raises(ConfigurationError, match="check AWS_ENDPOINT"),
    ):
        stat(S3UnderStore("s3", "s3://bucket"), "a")


def test_a_profile_that_is_none(s3: SeaweedFS) -> None:
    with (
        environment({"AWS_PROFILE": "nobody"}),
        pytest.raises(ConfigurationError, match=r"nobody.*AWS_PROFILE"),
    ):
        stat(S3UnderStore("s3", "s3://bucket"), "a")


def test_objects_that_vanish_or_change_after_they_were_listed(bucket: str, s3: SeaweedFS) -> None:
    under_store = S3UnderStore("s3", f"s3://{bucket}")
    info = under_store.stat("a", deadline=soon())
    s3.client.put_object(Bucket=bucket, Key="a", Body=b"date")
    with pytest.raises(
        ObjectChanged, match=f"s3://{bucket}/a was overwritten since it was listed; create the dataset"
    ):
        under_store.read(info, ByteRange(0, 4), deadline=soon())
    s3.client.delete_object(Bucket=bucket, Key="a")
    with pytest.raises(ObjectNotFound, match=f"s3://{bucket}/a is gone .* create the dataset again"):
        under_store.read(info, ByteRange(0, 4), deadline=soon())
    under_store.close()
