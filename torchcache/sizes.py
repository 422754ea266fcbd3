"""Sizes as people write them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from torchcache.errors import ConfigurationError

_UNITS: Final = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgtp", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZE: Final = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of a size like "100GB" (powers of 1000), "64MiB" (powers of 1024), "1.5T" or a plain number of bytes.

    Raises ConfigurationError for anything else, and for a size of zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigurationError(
                f"{text!r} is not a size: write it like 100GB, 64MiB or a number of bytes"
            )
        size = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ConfigurationError(f"a size of {text!r} holds nothing: it must be more than zero bytes")
    return size
