"""Braces, patterns and folders: what a user's source means."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.memory_pool import MemoryPool
from torchcache.data import progress
from torchcache.data.iterable_sources import common_folder, expand, find_shards, translated
from torchcache.errors import ConfigurationError
from torchcache.model import ObjectId, ObjectInfo


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..8..4}", ["0", "4", "8"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
        ("x{a,}y", ["xay", "xy"]),
        ("{a}", ["a"]),
        ("{000..001}/{9..10}", ["000/9", "000/10", "001/9", "001/10"]),
    ],
)
def test_braces_as_a_shell_expands_them(text: str, expected: list[str]) -> None:
    assert expand(text) == expected


@pytest.mark.parametrize("text", ["{0..1000000}", "{0..999}{0..999}{0..999}", "{0..5..0}"])
def test_too_many_names(text: str) -> None:
    with pytest.raises(ConfigurationError, match="more than 1,000,000"):
        expand(text)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.tar", ["a.tar", ".tar"], ["a/b.tar", "a.tar.gz", "atar"]),
        ("**/*.tar", ["a.tar", "a/b.tar", "a/b/c.tar"], ["a/b.ta"]),
        ("a/**", ["a/b", "a/b/c"], ["b/a"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("[ab]x", ["ax", "bx"], ["cx"]),
        ("[!ab]x", ["cx"], ["ax"]),
        ("a+b(c).tar", ["a+b(c).tar"], ["aab(c).tar"]),
    ],
)
def test_patterns(pattern: str, matching: list[str], others: list[str]) -> None:
    matches = re.compile(translated(pattern)).fullmatch
    assert all(matches(name) for name in matching)
    assert not any(matches(name) for name in others)


@given(st.text(alphabet="ab*?[]!/.\\-^(){}|+$", max_size=12))
def test_any_pattern_is_an_expression(pattern: str) -> None:
    re.compile(translated(pattern))


@pytest.mark.parametrize(
    ("uris", "folder"),
    [
        (["s3://b/a/x.tar"], "s3://b/a"),
        (["s3://b/a/x.tar", "s3://b/ab/y.tar"], "s3://b"),
        (["s3://b/a/1/x", "s3://b/a/2/x", "s3://b/a/x"], "s3://b/a"),
        (["s3://b/x", "s3://c/x"], "s3://b"),
        (["file:///data/x", "file:///data/y"], "file:///data"),
    ],
)
def test_the_folder_of_all(uris: list[str], folder: str) -> None:
    assert common_folder(uris) == folder


@pytest.mark.parametrize(
    "source",
    ["{}b/d/*.tar", "{}b/d", "{}b/d/{{0..8}}.tar", "{}b/d/3.tar"],
    ids=["pattern", "folder", "names", "name"],
)
def test_shards_are_found_alike_by_the_name_of_their_storage(source: str) -> None:
    pool: Any = MemoryPool()
    for number in range(9):
        pool.put(f"s3://b/d/{number}.tar", b"x")
    stats: list[str] = []
    stat, pool.stat = pool.stat, lambda uri: stats.append(uri) or stat(uri)
    by_uri, asked = find_shards(pool, source.format("s3://")), stats.copy()
    stats.clear()
    assert find_shards(pool, source.format("torchcache://s3/")) == by_uri
    assert stats == asked


@pytest.mark.parametrize(
    "source", ["s3://b/d/*.tar", "s3://b/d", "s3://b/d/{0000..2499}.tar"], ids=["pattern", "folder", "names"]
)
def test_a_long_listing_comes_in_any_order_and_says_how_far_it_is(
    source: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    caplog.set_level("INFO", "torchcache")
    pool: Any = MemoryPool()
    keys = [f"b/d/{number:04d}.tar" for number in range(2500)]
    monkeypatch.setattr(
        pool,
        "list_in_any_order",
        lambda uri: (ObjectInfo(ObjectId("s3", key, "v"), 1) for key in reversed(keys)),
    )
    assert [shard.id.key for shard in find_shards(pool, source)] == keys
    assert "listing s3://b/d: 1000 objects so far" in caplog.text
