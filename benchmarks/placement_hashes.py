"""The hash that placement goes by, over many keys at once: XXH3-64 of a server's id, seeded by the key's own hash.

The same numbers as the library's, for ids of 32 bytes, which is what servers have (a test compares them); after the
specification's variant for 17 to 128 bytes: https://github.com/Cyan4973/xxHash/blob/v0.8.2/doc/xxhash_spec.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

ID_BYTES: Final = 32
BLOCK: Final = 8192
"""Keys at a time: what is worked on stays in the processor's cache."""

_LENGTH_WORD: Final = np.uint64(ID_BYTES * 0x9E3779B185EBCA87 % 2**64)
_AVALANCHE: Final = np.uint64(0x165667919E3779F9)
_SECRET: Final = tuple(
    np.uint64(word)
    for word in (0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072)
)
_LOW: Final = np.uint64(2**32 - 1)
_HALF: Final = np.uint64(32)
_THIRTY_SEVEN: Final = np.uint64(37)


class Hashing:
    """Of keys by their own hashes, at most `BLOCK` of them; of one server after the other. Memory is used again."""

    def __init__(self, seeds: Words) -> None:
        words = (_SECRET[0] + seeds, _SECRET[1] - seeds, _SECRET[2] + seeds, _SECRET[3] - seeds)
        self._halves = [(word & _LOW, word >> _HALF) for word in words]
        self._scratch = [np.empty_like(seeds) for _ in range(6)]
        self._one, self._other = np.empty_like(seeds), np.empty_like(seeds)

    def hashes(self, server: bytes) -> Words:
        """Of each key; to be used before the next call. Raises ValueError if the id isn't of `ID_BYTES`."""
        if len(server) != ID_BYTES:
            raise ValueError(f"an id of {len(server)} bytes: it takes {ID_BYTES}")
        words = np.frombuffer(server, "<u8").astype(np.uint64)
        one, other = self._one, self._other
        self._folded_product(0, words[0], words[1], one)
        self._folded_product(2, words[2], words[3], other)
        np.add(one, other, out=one)
        np.add(one, _LENGTH_WORD, out=one)
        np.right_shift(one, _THIRTY_SEVEN, out=other)
        np.bitwise_xor(one, other, out=one)
        np.multiply(one, _AVALANCHE, out=one)
        np.right_shift(one, _HALF, out=other)
        np.bitwise_xor(one, other, out=one)
        return one

    def _folded_product(self, at: int, one: np.uint64, other: np.uint64, out: Words) -> None:
        """Both halves of the 128 bits of a product, exclusive-or'ed. Its factors are the words from `at` on, mixed."""
        low, high, other_low, other_high, crossed, middle = self._scratch
        np.bitwise_xor(self._halves[at][0], one & _LOW, out=low)
        np.bitwise_xor(self._halves[at][1], one >> _HALF, out=high)
        np.bitwise_xor(self._halves[at + 1][0], other & _LOW, out=other_low)
        np.bitwise_xor(self._halves[at + 1][1], other >> _HALF, out=other_high)
        np.multiply(low, other_high, out=crossed)
        np.multiply(high, other_low, out=middle)
        np.multiply(high, other_high, out=out)
        np.multiply(low, other_low, out=low)
        for part in (np.right_shift(low, _HALF, out=high), np.bitwise_and(crossed, _LOW, out=other_low)):
            np.add(middle, part, out=middle)
        for part in (np.right_shift(crossed, _HALF, out=crossed), np.right_shift(middle, _HALF, out=high)):
            np.add(out, part, out=out)
        np.left_shift(middle, _HALF, out=middle)
        np.bitwise_and(low, _LOW, out=low)
        np.bitwise_or(middle, low, out=middle)
        np.bitwise_xor(out, middle, out=out)


def owners(
    seeds: Words, servers: Sequence[bytes], weights: Sequence[float] | None = None
) -> NDArray[np.int32]:
    """Of each key, by its hash, the number of the server that owns it; see `torchcache.placement.Placement`."""
    return np.concatenate(
        [_block_owners(seeds[at : at + BLOCK], servers, weights) for at in range(0, len(seeds), BLOCK)]
    )


def _block_owners(
    seeds: Words, servers: Sequence[bytes], weights: Sequence[float] | None
) -> NDArray[np.int32]:
    hashing = Hashing(seeds)
    best = np.zeros(len(seeds), np.uint64) if weights is None else np.full(len(seeds), -np.inf)
    found = np.zeros(len(seeds), np.int32)
    for number, server in enumerate(servers):
        scores: NDArray[np.uint64] | NDArray[np.float64] = hashing.hashes(server)
        if weights is not None:
            scores = np.log((scores + 0.5) * 2.0**-64) / weights[number]
        better = scores > best
        np.copyto(best, scores, where=better)
        np.copyto(found, number, where=better)
    return found
