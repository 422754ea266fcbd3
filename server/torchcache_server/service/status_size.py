"""What of a server's status fits a message, however many datasets it holds and whatever they are called. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

from torchcache.save_names import KEPT_PREFIXES
from torchcache_server.store import NamespaceUsage, Policy

MAX_NAMESPACES_BYTES: Final = 2 * 1024 * 1024
MAX_ORDERS_BYTES: Final = 1024 * 1024
MAX_PASSED_OVER_BYTES: Final = 256 * 1024
"""Of a message of 4 MiB: what else a status has takes little."""

_FRAME_BYTES: Final = 8
"""What a message takes at most beside itself where it is one of several in another."""

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def by_weight(namespaces: Iterable[NamespaceUsage]) -> list[NamespaceUsage]:
    """Checkpoints, then what somebody has set a policy of, then by what they hold, the most first.

    No reader makes one of the first two, so that none can crowd out what an operator looks for by name.
    """
    return sorted(
        namespaces,
        key=lambda n: (not n.name.startswith(KEPT_PREFIXES), n.policy == Policy(), -n.bytes, n.name),
    )


def fitting(told: Callable[[T], M], items: Sequence[T], limit_bytes: int) -> tuple[list[M], int]:
    """What is told of the first items, as many as take `limit_bytes` in a reply, and how many are left out."""
    found: list[M] = []
    left_bytes = limit_bytes
    for item in items:
        message = told(item)
        left_bytes -= message.ByteSize() + _FRAME_BYTES
        if left_bytes < 0:
            break
        found.append(message)
    return found, len(items) - len(found)
