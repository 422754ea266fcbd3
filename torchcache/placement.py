"""Rendezvous placement: which server owns a stripe, and who comes next. Pure.

Every client computes the same order from the same members, so there is no look-up and no metadata server. A server
that joins or leaves moves only the stripes it wins or held. (Thaler and Ravishankar, "Using name-based mappings to
increase hit rates", 1998; by weights: Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import repeat
from typing import Final

import xxhash

from torchcache.model import STRIPE_BYTES, ObjectId

_UNIT: Final = 2.0**-64


def placement_key(object_id: ObjectId, offset: int) -> bytes:
    """What is placed together: a stripe of an object, a whole computed sample, or a whole checkpoint folder.

    `offset` is any byte offset within the stripe.
    """
    if object_id.is_save:
        folder = object_id.key.rpartition("/")[0]
        return ObjectId(object_id.store, folder, "").digest
    if object_id.is_sample:
        return object_id.digest
    return object_id.digest + struct.pack("<Q", offset // STRIPE_BYTES)


class Placement:
    """The servers of a pool, and the order in which they are asked for a key. Immutable; equal if all orders are.

    A server owns as much of all keys as its weight is of all weights; one whose weight changes takes or gives only the
    difference. Weights count if every server has one above 0: a server of a version before them has none.
    """

    __slots__ = ("_encoded", "_weights", "members")

    def __init__(self, members: Iterable[str], weights: Mapping[str, float] | None = None) -> None:
        """`members` are server ids, each once, in any order. Without `weights` all are alike."""
        self.members: tuple[str, ...] = tuple(sorted(members))
        self._encoded = [member.encode() for member in self.members]
        given = [weights.get(member, 0.0) for member in self.members] if weights else []
        self._weights = given if len(set(given)) > 1 and min(given) > 0 else []

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.members == other.members and self.shares() == other.shares()

    def __hash__(self) -> int:
        return hash(self.members)

    def shares(self) -> list[Fraction]:
        """How much of all keys each of `members` owns, in their order; together 1."""
        weights = [Fraction(weight) for weight in self._weights or [1.0] * len(self.members)]
        whole = sum(weights)
        return [weight / whole for weight in weights]

    def order(self, key: bytes) -> list[str]:
        """The server ids by falling score for `key`: the owner first, then the fallbacks. Ties are broken by id."""
        members = self.members
        if len(members) < 2:
            return [*members]
        scores = self._scores(key)
        return [members[at] for at in sorted(range(len(members)), key=scores.__getitem__, reverse=True)]

    def owner(self, key: bytes) -> str:
        """The first of `order`, for less."""
        members = self.members
        if len(members) == 1:
            return members[0]
        scores = self._scores(key)
        return members[scores.index(max(scores))]

    def _scores(self, key: bytes) -> Sequence[float]:
        hashes = list(map(xxhash.xxh3_64_intdigest, self._encoded, repeat(xxhash.xxh3_64_intdigest(key))))
        if not self._weights:
            return hashes
        # Of numbers drawn evenly from (0, 1], weight / -log falls in the order that equal weights give.
        return [
            math.log((drawn + 0.5) * _UNIT) / weight
            for drawn, weight in zip(hashes, self._weights, strict=True)
        ]
