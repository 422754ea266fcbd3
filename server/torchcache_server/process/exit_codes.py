"""What a server's exit code says."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Stopped with nothing left to do."""

INCOMPLETE: Final = 1
"""Stopped, but something is not yet in the under-store, or failed."""

REFUSED: Final = 2
"""Could not start as it was told to."""
