"""Times as people write them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from torchcache.errors import ConfigurationError

_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION: Final = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Seconds of a time like "90s", "30m", "12h", "7d" or "2w". Raises ConfigurationError, also for no time at all."""
    match = _DURATION.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigurationError(f"{text!r} is not a time: write it like 90s, 30m, 12h, 7d or 2w")
    seconds = float(Decimal(match[1]) * _UNITS[match[2].lower()])
    if seconds <= 0:
        raise ConfigurationError(f"a time of {text!r} is none: it must be more than zero")
    return seconds
