"""What users may write for a checkpoint's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchcache.checkpoint.location import checkpoint_uri, looks_like_checkpoint
from torchcache.errors import ConfigurationError


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("s3://bucket/run/step-1", "s3://bucket/run/step-1"),
        ("s3://bucket/run/step-1/", "s3://bucket/run/step-1"),
        ("s3://bucket/a b%20c", "s3://bucket/a b%20c"),
        ("file:///ckpt/1", "file:///ckpt/1"),
        ("torchcache://s3/bucket/run/1/", "torchcache://s3/bucket/run/1"),
        ("/ckpt/1", "file:///ckpt/1"),
        (Path("/ckpt/1"), "file:///ckpt/1"),
        ("/ckpt/../one/", "file:///one"),
    ],
)
def test_paths_become_uris(given: str | Path, uri: str) -> None:
    assert checkpoint_uri(given) == uri
    assert looks_like_checkpoint(given)


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_uri("run/1") == f"file://{tmp_path.resolve()}/run/1"


@pytest.mark.parametrize(
    "given",
    ["", "s3://", "s3:///", "s3://b//x", "s3://b/../x", "s3://b/./x", "/", "a\0b", b"/x", "torchcache://s3"],
)
def test_what_names_no_folder_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError):
        checkpoint_uri(given)
    assert not looks_like_checkpoint(given)


def test_a_uri_mangled_by_pathlib_is_explained() -> None:
    with pytest.raises(ConfigurationError, match=r"went through pathlib.*'s3://\.\.\.'"):
        checkpoint_uri(Path("s3://bucket/run"))


def test_other_schemes_are_not_claimed() -> None:
    assert not looks_like_checkpoint("gs://bucket/x")
    assert not looks_like_checkpoint(3)
