"""Claims, read from and written to the under-store: the I/O around claims.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Container
from typing import Final

from torchcache.errors import AlreadyExists
from torchcache_server.cache.claims import Claim, ClaimState, Displaced, Sighting
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.small_objects import read_small, stat_or_none, write_small
from torchcache_server.understore.base import UnderStore

FORGET_LEASES: Final = 60
"""The claim of a path of which nothing else is known is forgotten when nobody has asked for it for so many leases."""


class ClaimBook:
    """What this server knows of the claims of paths it deals with. Thread-safe.

    `clock` is time.monotonic; tests pass another.
    """

    def __init__(self, server_id: str, *, lease_s: float, clock: Callable[[], float]) -> None:
        self.server_id = server_id
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[SaveKey, Sighting] = {}
        self._asked_s: dict[SaveKey, float] = {}  # when the sighting of that path was wanted last
        self._lock = threading.Lock()

    def look(self, under_store: UnderStore, key: SaveKey, *, deadline: float) -> Sighting | None:
        """The claim of `key` as it stands now; None if nobody claims it."""
        found = stat_or_none(under_store, key.claim_key, deadline=deadline)
        with self._lock:
            known = self._seen.get(key)
            if known is not None:
                self._asked_s[key] = self._clock()
        if found is None:
            return self._note(key, None)
        if known is not None and known.version == found.id.version:
            return known
        small = read_small(under_store, key.claim_key, deadline=deadline)
        if small is None:
            return self._note(key, None)
        return self._note(key, Sighting(Claim.decode(small.data), small.version, self._clock()))

    def now_s(self) -> float:
        """The time that sightings are measured in."""
        return self._clock()

    def forget_but(self, known: Container[SaveKey]) -> None:
        """Forgets the claims of other paths than these, once nobody counts how long they haven't changed.

        Others' claims vanish without a word: who reads a path, or had a copy, has seen it, and doesn't look again.
        """
        now_s = self._clock()
        with self._lock:
            for key, seen in tuple(self._seen.items()):
                unasked_s = now_s - max(self._asked_s[key], seen.dead_at_s)
                if key not in known and unasked_s >= FORGET_LEASES * self._lease_s:
                    del self._seen[key], self._asked_s[key]

    def holds(self, under_store: UnderStore, key: SaveKey, save_id: str, *, deadline: float) -> bool:
        """Whether the claim is this server's, for this save."""
        seen = self.look(under_store, key, deadline=deadline)
        return seen is not None and seen.claim.server_id == self.server_id and seen.claim.save_id == save_id

    def write(
        self,
        under_store: UnderStore,
        key: SaveKey,
        *,
        save_id: str,
        state: ClaimState,
        writer: str,
        replaces: str,
        deadline: float,
        over: Displaced | None = None,
    ) -> None:
        """Takes the claim, or changes it. Raises AlreadyExists if its version isn't `replaces` any more."""
        claim = Claim(self.server_id, save_id, state, writer, self._lease_s, over=over)
        self._write(under_store, key, claim, replaces, deadline)

    def refresh(
        self,
        under_store: UnderStore,
        key: SaveKey,
        save_id: str,
        *,
        deadline: float,
        state: ClaimState = "reserved",
    ) -> None:
        """Tells other servers that the claim's holder lives, if a lease has passed since they were told."""
        with self._lock:
            seen = self._seen.get(key)
        if seen is None or self._clock() < seen.since_s + self._lease_s:
            return
        seen = self.look(under_store, key, deadline=deadline)
        if seen is None or not self._is_own(seen, {save_id}) or seen.claim.state != state:
            return
        try:
            self._rewrite(under_store, key, seen, state, deadline)
        except AlreadyExists:
            pass  # Taken over just now: the commit will meet it.

    def release(
        self,
        under_store: UnderStore,
        key: SaveKey,
        save_ids: Collection[str],
        *,
        deadline: float,
        counts_on: Callable[[Displaced], bool] = lambda displaced: False,
    ) -> None:
        """Gives the claim up, if it is this server's for one of `save_ids`: to the save that it was taken from, if that
        `counts_on`.
        """
        seen = self.look(under_store, key, deadline=deadline)
        if seen is None or not self._is_own(seen, save_ids):
            return
        try:
            over = seen.claim.over
            if over is not None and counts_on(over):
                back = Claim(over.server_id, over.save_id, "committed", over.writer, self._lease_s)
                seen = self._write(under_store, key, back, seen.version, deadline)
                if counts_on(over):
                    return
                # It was uploaded just now; its server may have looked at the claim before it got that back.
            self._rewrite(under_store, key, seen, "released", deadline)
        except AlreadyExists:
            return  # Somebody took it over: it is theirs now.
        under_store.delete(key.claim_key, deadline=deadline)
        self._note(key, None)

    def _rewrite(
        self, under_store: UnderStore, key: SaveKey, seen: Sighting, state: ClaimState, deadline: float
    ) -> None:
        self.write(
            under_store,
            key,
            save_id=seen.claim.save_id,
            state=state,
            writer=seen.claim.writer,
            replaces=seen.version,
            deadline=deadline,
            over=seen.claim.over if state == "reserved" else None,
        )

    def _write(
        self, under_store: UnderStore, key: SaveKey, claim: Claim, replaces: str, deadline: float
    ) -> Sighting:
        version = write_small(
            under_store, key.claim_key, claim.encode(), replaces=replaces, deadline=deadline
        )
        seen = Sighting(claim, version, self._clock())
        self._note(key, seen)
        return seen

    def _is_own(self, seen: Sighting, save_ids: Collection[str]) -> bool:
        return seen.claim.server_id == self.server_id and seen.claim.save_id in save_ids

    def _note(self, key: SaveKey, seen: Sighting | None) -> Sighting | None:
        with self._lock:
            if seen is None:
                self._seen.pop(key, None)
                self._asked_s.pop(key, None)
            else:
                self._seen[key] = seen
                self._asked_s[key] = self._clock()
        return seen
