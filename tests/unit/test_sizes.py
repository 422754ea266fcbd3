"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import ConfigurationError
from torchcache.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100GB", 100 * 10**9),
        ("64MiB", 64 * 2**20),
        ("1.5T", 1_500_000_000_000),
        (" 7 kb ", 7000),
        ("512", 512),
        (512, 512),
        ("3B", 3),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "10 apples", "-5GB", "1e9", "10GBs", "0", "0.0001", "\u0661GB", 0, -3, True, None, 1.5]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigurationError, match="size"):
        parse_size(text)  # type: ignore[arg-type]


@given(st.integers(min_value=1, max_value=10**18 - 1))
def test_plain_bytes_come_back(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == parse_size(f"{size}b")
