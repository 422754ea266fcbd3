"""Bounds that both ends of the wire keep."""

from __future__ import annotations

from typing import Final

MAX_INLINE_BYTES: Final = 2 * 1024 * 1024
"""Metadata and manifest of a save travel within a control message up to this size together, else as objects."""
