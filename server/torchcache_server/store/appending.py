"""Storing new chunks: room is taken, made if need be, and what fails is given back."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from typing import Final

from torchcache.errors import OutOfSpace
from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.core import Core
from torchcache_server.store.eviction import NEVER
from torchcache_server.store.room import (
    Promise,
    check_quota,
    evict_others,
    make_room,
    refuse_if_out_of_service,
)
from torchcache_server.store.space import check_name
from torchcache_server.store.writing import (
    Draft,
    Part,
    Reserved,
    commit,
    give_back,
    release,
    reserve,
    write,
)

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


def append(
    core: Core, namespace: str, drafts: Sequence[Draft], promised: Promise | None = None
) -> list[StoredChunk]:
    """Stores the drafts, each of another chunk, in one index transaction.

    Raises OutOfSpace, and then none of them is stored.
    """
    check_room(core, namespace, 0 if promised is not None else sum(d.header.record_bytes for d in drafts))
    reserved = take_room(core, namespace, drafts, promised)
    try:
        try:
            for part in reserved.parts:
                _write(core, namespace, part)
            commit(core, drafts)
        except OSError as error:
            give_back(core, reserved, seal=error.errno not in _FULL)
            raise OutOfSpace(
                f"the store's disk takes no more: {error}; free some disk space or give a smaller capacity"
            ) from error
        except OutOfSpace:
            give_back(core, reserved, seal=False)
            raise
    finally:
        release(core, reserved)
    return [one.stored for one in drafts]


def check_room(core: Core, namespace: str, bytes: int) -> None:
    """Raises OutOfSpace if the namespace may take so much more of no disk or no quota; 0 was promised before.

    Raises ConfigurationError for a name that can't be.
    """
    check_name(namespace)
    refuse_if_out_of_service(core)
    if bytes:
        with core.lock:
            check_quota(core, namespace, bytes)


def take_room(
    core: Core,
    namespace: str,
    drafts: Sequence[Draft],
    promised: Promise | None = None,
    *,
    alone: bool = False,
) -> Reserved:
    """`reserve`, room being made if need be. Raises OutOfSpace."""
    next_use = _next_use(core, namespace, drafts)
    promised_bytes = promised.bytes if promised is not None else 0
    while True:
        got = reserve(core, namespace, drafts, promised_bytes=promised_bytes, alone=alone)
        if isinstance(got, Reserved):
            if promised is not None:
                promised.release()
            with core.lock:
                core.used(core.space.namespace(namespace))
            return got
        make_room(core, namespace, got, next_use=next_use)


def _next_use(core: Core, namespace: str, drafts: Sequence[Draft]) -> int:
    with core.lock:
        owner = core.space.namespaces.get(namespace)
        order = owner.order if owner is not None else None
    return NEVER if order is None else min(order.next_uses([one.key for one in drafts]))


def _write(core: Core, namespace: str, part: Part) -> None:
    """Writes the records. A disk that is full gets one more chance, after spares or others' segments have gone."""
    try:
        write(core, part)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with core.lock:
            freed = core.spares.trim(part.size)
        if freed < part.size:
            if not evict_others(core, namespace, part.size):
                raise
            with core.lock:
                core.spares.trim(part.size)
            _log.warning("the disk is full before the store is: others' segments were evicted")
        write(core, part)
