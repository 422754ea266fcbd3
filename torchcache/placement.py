"""Rendezvous placement: which server owns a stripe, and who comes next. Pure.

Every client computes the same order from the same members, so there is no look-up and no metadata server. A server
that joins or leaves moves only the stripes it wins or held. (Thaler and Ravishankar, "Using name-based mappings to
increase hit rates", 1998.)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

from torchcache.model import STRIPE_BYTES, ObjectId


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


def rendezvous_order(key: bytes, members: Sequence[str]) -> list[str]:
    """`members` (server ids) by falling weight for `key`: the owner first, then the fallbacks.

    Does not depend on the order of `members`; ties are broken by id.
    """
    if len(members) < 2:
        return list(members)
    weigh = xxhash.xxh3_64_intdigest
    seed = weigh(key)
    return [member for _, member in sorted([(-weigh(m.encode(), seed), m) for m in members])]


def owner(key: bytes, members: Sequence[str]) -> str:
    """The first of `rendezvous_order`, for less."""
    weigh = xxhash.xxh3_64_intdigest
    seed = weigh(key)
    return min([(-weigh(m.encode(), seed), m) for m in members])[1]
