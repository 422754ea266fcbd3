"""Bytes from one buffer into another, in steps that stay in a core's own cache while they are verified there.

A chunk of 4 MiB is more than that cache holds: copied whole and then hashed it travels twice, which takes a fifth more.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import xxhash

STEP_BYTES: Final = 256 * 1024
"""Of four times as much, source and target together leave no room in a cache of 1 or 2 MiB, and what was just copied
comes from memory again to be hashed."""

SHARED_BYTES: Final = 256 * 1024
"""From here on it pays to let other threads run meanwhile."""


def copy(source: memoryview, target: memoryview) -> None:
    """Copies to a buffer of the same length."""
    if len(source) < SHARED_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def copy_and_hash(source: memoryview, target: memoryview, hasher: xxhash.xxh3_64) -> None:
    """Copies to a buffer of the same length, and updates `hasher` with what then lies there."""
    into, out_of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    for at in range(0, len(into), STEP_BYTES):
        step = into[at : at + STEP_BYTES]
        np.copyto(step, out_of[at : at + STEP_BYTES])
        hasher.update(step.data)


def hashed_copy(source: memoryview, target: memoryview) -> int:
    """Copies to a buffer of the same length, and gives the xxh3-64 of what then lies there."""
    if len(source) <= STEP_BYTES:
        copy(source, target)
        return xxhash.xxh3_64_intdigest(target)
    hasher = xxhash.xxh3_64()
    copy_and_hash(source, target, hasher)
    return hasher.intdigest()
