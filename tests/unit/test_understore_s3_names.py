from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.process.config import parse_under_stores
from torchcache_server.understore import create
from torchcache_server.understore.s3_names import S3Object, S3Root

from torchcache.errors import ConfigurationError

_SEGMENTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda text: text not in (".", "..")
)
KEYS = st.lists(_SEGMENTS, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("uri", "root", "shown"),
    [
        ("s3://", S3Root("", ""), "s3://"),
        ("s3://bucket", S3Root("bucket", ""), "s3://bucket"),
        ("s3://bucket/", S3Root("bucket", ""), "s3://bucket"),
        ("s3://bucket/a/b", S3Root("bucket", "a/b/"), "s3://bucket/a/b"),
        ("s3://bucket/a/b/", S3Root("bucket", "a/b/"), "s3://bucket/a/b"),
    ],
)
def test_roots(uri: str, root: S3Root, shown: str) -> None:
    assert S3Root.parse(uri) == root
    assert root.uri == shown


@pytest.mark.parametrize(
    "uri",
    [
        "s3:/bucket",
        "s3:///bucket",
        "s3://Bucket with spaces",
        "s3://user:secret@bucket",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint:mine",
        "s3://bucket/../other",
        "s3://169.254.169.254:80/",
        "http://bucket",
    ],
)
def test_what_is_no_root(uri: str) -> None:
    with pytest.raises(ConfigurationError):
        S3Root.parse(uri)


@given(KEYS)
def test_keys_lie_under_the_prefix_and_come_back(key: str) -> None:
    root = S3Root.parse("s3://bucket/some/prefix")
    located = root.locate(key)
    assert located == S3Object("bucket", f"some/prefix/{key}")
    assert root.relative(located) == key


@given(KEYS)
def test_keys_without_a_root_begin_with_the_bucket(key: str) -> None:
    root = S3Root.parse("s3://")
    located = root.locate(f"bucket/{key}")
    assert located == S3Object("bucket", key)
    assert root.relative(located) == f"bucket/{key}"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "bucket",
        "bucket/",
        "/key",
        "arn:aws:s3:us-east-1:123456789012:accesspoint:mine/key",
        "arn:aws:s3-outposts:us-east-1:123456789012:outpost:op-1:accesspoint:mine/key",
        "evil.example:80/key",
        "bucket@evil/key",
        "bucket?x/key",
        "bu/../key",
    ],
)
def test_a_key_can_not_name_anything_but_an_object_of_a_bucket(key: str) -> None:
    with pytest.raises(ConfigurationError):
        S3Root.parse("s3://").locate(key)


def test_a_listing_names_its_bucket_in_full() -> None:
    root = S3Root.parse("s3://")
    assert root.locate_prefix("bucket/") == S3Object("bucket", "")
    assert root.locate_prefix("bucket/a") == S3Object("bucket", "a")
    for prefix in ("", "buck"):
        with pytest.raises(ConfigurationError, match="names no bucket to list"):
            root.locate_prefix(prefix)
    assert S3Root.parse("s3://bucket/p").locate_prefix("") == S3Object("bucket", "p/")


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: S3Root.parse("s3://AKIAEXAMPLE:sec/ret@bucket/prefix"),
        lambda: create("s3", "https://AKIAEXAMPLE:sec/ret@storage/bucket"),
        lambda: parse_under_stores(["s3://AKIAEXAMPLE:sec/ret@bucket"]),
        lambda: parse_under_stores(["s3://AKIAEXAMPLE:sec=ret@bucket"]),
        lambda: create("file", "file://AKIAEXAMPLE:sec@ret@host/folder"),
    ],
)
def test_credentials_in_a_uri_are_not_shown(refuse: Callable[[], object]) -> None:
    """Others take them there. The message goes to the journal."""
    with pytest.raises(ConfigurationError, match=r"://\[hidden\]@") as refused:
        refuse()
    assert "AKIA" not in str(refused.value)
    assert "ret" not in str(refused.value)


@pytest.mark.parametrize("call", ["locate", "locate_prefix"])
def test_credentials_that_a_client_puts_into_a_uri_are_not_shown(call: str) -> None:
    with pytest.raises(ConfigurationError, match="can't be the name of an S3 bucket") as refused:
        getattr(S3Root.parse("s3://"), call)("AKIAEXAMPLE:sec/ret@bucket/key")
    for shown in (str(refused.value), str(refused.value.object)):
        assert "AKIA" not in shown
        assert "ret" not in shown
