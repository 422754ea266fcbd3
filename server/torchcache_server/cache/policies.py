"""Changes of what users want of a namespace's place in the store, and what of it they may want."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from torchcache.errors import ConfigurationError
from torchcache.model import SAVE_PREFIX
from torchcache.save_names import KEPT_PREFIXES
from torchcache_server.store import NamespaceUsage, Policy, Store

MAX_WAITING: Final = 10_000
"""Namespaces with a policy that hold nothing: each takes memory and a record, and none is ever evicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChange:
    """What of a policy is to be another: None stays as it is, a `quota_bytes` or `ttl_s` of 0 is taken away."""

    pinned: bool | None = None
    priority: int | None = None
    quota_bytes: int | None = None
    ttl_s: float | None = None

    @property
    def is_only_a_pin(self) -> bool:
        return self.priority is None and self.quota_bytes is None and self.ttl_s is None

    def apply(self, policy: Policy) -> Policy:
        """The policy after the change. Raises ConfigurationError for what makes no sense."""
        return replace(
            policy,
            pinned=policy.pinned if self.pinned is None else self.pinned,
            priority=policy.priority if self.priority is None else self.priority,
            quota_bytes=policy.quota_bytes if self.quota_bytes is None else self.quota_bytes or None,
            ttl_s=policy.ttl_s if self.ttl_s is None else self.ttl_s or None,
        )


class Policies:
    """What users may change of a store's namespaces. Thread-safe.

    A save lives as long as its checkpoint, and the bytes of an object that is put as long as its upload: neither has a
    quota, a time to live or a priority. A save can be pinned: its copy then stays in the pool when it is durable too,
    until the save is dropped, which ends the pin.
    """

    def __init__(
        self,
        store: Store,
        *,
        settle_pin: Callable[[str], None] = lambda _: None,
        is_save: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`settle_pin` is told of saves that were pinned or unpinned: they may lie elsewhere too.

        `is_save` says of a namespace without a byte whether a save here has it: all of that may be borrowed.
        """
        self._store = store
        self._settle_pin = settle_pin
        self._is_save = is_save
        self._lock = threading.Lock()  # a change is read, then written

    def change(self, namespace: str, change: PolicyChange) -> NamespaceUsage | None:
        """Changes the policy, durably, and returns what the namespace now is; None for one that is nothing.

        A pin of a save that isn't here changes nothing: another server has it. Raises ConfigurationError for what makes
        no sense or may not be, OutOfSpace or TorchCacheError if the disk fails: then nothing has changed.
        """
        with self._lock:
            found = self._usage(namespace)
            if namespace.startswith(KEPT_PREFIXES):
                _check_kept(namespace, change)
                if found is None and not self._is_save(namespace):
                    return None
            before = self._store.policy(namespace)
            after = change.apply(before)
            if found is None and after != Policy():
                self._check_waiting()
            if after != before:
                self._store.set_policy(namespace, after)
            if namespace.startswith(SAVE_PREFIX):  # again, if it failed the last time
                self._settle_pin(namespace)
            return self._usage(namespace)

    def evict(self, namespace: str) -> int:
        """Frees what the namespace holds; returns the bytes. Raises ConfigurationError if it is pinned or kept."""
        return self._store.evict(namespace)

    def _usage(self, namespace: str) -> NamespaceUsage | None:
        return next((usage for usage in self._store.namespaces() if usage.name == namespace), None)

    def _check_waiting(self) -> None:
        waiting = sum(not usage.chunks for usage in self._store.namespaces())
        if waiting >= MAX_WAITING:
            raise ConfigurationError(
                f"{waiting} datasets that hold nothing have a policy, as many as may: unpin some that will not come"
            )


def _check_kept(namespace: str, change: PolicyChange) -> None:
    if not namespace.startswith(SAVE_PREFIX):
        raise ConfigurationError(
            f"{namespace} is on its way to storage, and then gone from here: it has no policy",
            object=namespace,
        )
    if not change.is_only_a_pin:
        raise ConfigurationError(
            f"{namespace} lives as long as its checkpoint: it can be pinned, but has no quota, time to live or "
            "priority",
            object=namespace,
        )
