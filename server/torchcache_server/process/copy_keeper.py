"""Keeps what isn't durable yet on as many servers as hold it by its commit, and each of them sound.

The server that is to upload a save, as the claim says, asks the others now and then who has it. Where that is too few
for longer than a grace, the next in order get a copy. A chunk that is damaged here is fetched from another server. See
docs/decisions/0025-the-owner-makes-lost-copies-again.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torchcache.errors import IntegrityError, ServerUnavailable, TorchCacheError
from torchcache_server.cache.claims import DEAD_AFTER_LEASES
from torchcache_server.cache.holdings import Holdings
from torchcache_server.cache.recopy_plan import Watch, begin, is_due, is_short
from torchcache_server.cache.saves import Save

if TYPE_CHECKING:
    from .peers import Peers

RATE_BYTES_S: Final = 256 * 1024 * 1024
"""At most so much is copied, by one thread: readers and savers come first."""

REFUSED_S: Final = 600.0
"""A server that could not take a copy isn't asked to again for so long: it may be full, or damaged."""
AWAY_S: Final = 60.0
"""And one that couldn't be reached."""

CLAIM_S: Final = 5.0
CLOSE_S: Final = 15.0

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """The server closes."""


class Unwanted(Exception):
    """The save is durable by now, or gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCounts:
    """`wanted` and `held` are of the saves that wait for their upload here, as far as was found; the others add up."""

    wanted: int = 0
    held: int = 0
    made: int = 0
    mended_chunks: int = 0


class CopyKeeper:
    """The thread that does so, from construction until `close`.

    `mended` is called when a save that could not be uploaded is sound again.
    """

    def __init__(
        self, holdings: Holdings, peers: Peers, *, lease_s: float, mended: Callable[[], None]
    ) -> None:
        self._holdings = holdings
        self._peers = peers
        self._lease_s = lease_s
        self._grace_s = DEAD_AFTER_LEASES * lease_s
        self._mended = mended
        self._watches: dict[str, Watch] = {}
        self._refused: dict[tuple[str, str], float] = {}  # by save id and server: until when that isn't asked
        self._damaged = 0  # chunks, when all was looked through last
        self._mend_again_s = 0.0
        self._made = self._mended_chunks = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copy-keeper", daemon=True)
        self._thread.start()

    def counts(self) -> CopyCounts:
        """What is to be seen from outside."""
        watches = tuple(self._watches.values())
        return CopyCounts(
            wanted=sum(watch.wanted for watch in watches),
            held=sum(min(watch.held, watch.wanted) for watch in watches),
            made=self._made,
            mended_chunks=self._mended_chunks,
        )

    def close(self) -> None:
        """Begins nothing more, and ends what runs between two calls; idempotent."""
        self._closed.set()
        self._thread.join(CLOSE_S)
        self._peers.close()

    def _run(self) -> None:
        while not self._closed.wait(self._lease_s):
            for work in (self._mend, self._copy):
                try:
                    work()
                except Stopped:
                    return
                except TorchCacheError as error:
                    _log.warning("copies of checkpoints can't be looked after now: %s", error)
                except Exception:  # noqa: BLE001 - logged; the next round may fare better
                    _log.exception("looking after copies of checkpoints met an error nobody foresaw")

    # ---- copies that are lost ----

    def _copy(self) -> None:
        waiting = self._holdings.waiting()
        now_s = time.monotonic()
        self._watches = {
            one.save.save_id: self._watches.get(one.save.save_id)
            or begin(one.save.replicas, one.pending_bytes, now_s)
            for one in waiting
        }
        self._refused = {
            (save_id, server): until_s
            for (save_id, server), until_s in self._refused.items()
            if save_id in self._watches and now_s < until_s
        }
        for one in waiting:
            watch = self._watches[one.save.save_id]
            if is_due(watch, one.pending_bytes, now_s=time.monotonic(), grace_s=self._grace_s):
                try:
                    self._keep_up(one.save, watch)
                except Unwanted:
                    continue

    def _keep_up(self, save: Save, watch: Watch) -> None:
        if not self._holdings.is_responsible(save, deadline=time.monotonic() + CLAIM_S):
            return
        others = self._peers.look(save)
        holders: set[str] = set()
        for server in others:
            self._check(save)
            if len(holders) + 1 < watch.wanted and self._peers.holds(server, save):
                holders.add(server)
        watch = watch.found(1 + len(holders), time.monotonic())
        self._watches[save.save_id] = watch
        if not is_short(watch, now_s=time.monotonic(), grace_s=self._grace_s):
            return
        able = [one for one in others if one not in holders and (save.save_id, one) not in self._refused]
        for server in able:
            if watch.held >= watch.wanted:
                break
            _log.warning(
                "%s (save %s) isn't in the under-store yet, and %d servers have it, not %d: it is copied to server %s",
                *(save.key, save.save_id, watch.held, watch.wanted, self._peers.address(server)),
            )
            if self._send(server, save):
                watch = watch.found(watch.held + 1, time.monotonic())
                self._watches[save.save_id] = watch

    def _send(self, server: str, save: Save) -> bool:
        began_s, total = time.monotonic(), 0

        def sent(size: int) -> None:
            nonlocal total
            total += size
            self._closed.wait(began_s + total / RATE_BYTES_S - time.monotonic())
            self._check(save)

        try:
            self._peers.send(server, save, self._holdings.chunks, sent)
        except TorchCacheError as error:
            _log.warning("%s can't be copied to server %s: %s", save.key, self._peers.address(server), error)
            pause_s = AWAY_S if isinstance(error, ServerUnavailable) else REFUSED_S
            self._refused[save.save_id, server] = time.monotonic() + pause_s
            return False
        self._made += 1
        _log.info(
            "%s (save %s) was copied to server %s: %d bytes in %.1f s",
            *(save.key, save.save_id, self._peers.address(server), total, time.monotonic() - began_s),
        )
        return True

    def _check(self, save: Save) -> None:
        """Raises Stopped, or Unwanted."""
        if self._closed.is_set():
            raise Stopped
        if not self._holdings.is_wanted(save):
            raise Unwanted

    # ---- chunks that are damaged ----

    def _mend(self) -> None:
        """Looks through what a reader or an upload found damaged; through all, if the store knows of more damage."""
        failed = [one.save for one in self._holdings.waiting() if isinstance(one.save.error, IntegrityError)]
        suspects = self._holdings.take_reported()
        now_s = time.monotonic()
        if now_s >= self._mend_again_s:
            suspects += failed
        if self._holdings.damaged_chunks > self._damaged:
            suspects = self._holdings.all()
        if not suspects:
            return
        self._mend_again_s = now_s + self._grace_s
        for save in {save.save_id: save for save in suspects}.values():
            try:
                self._mend_save(save)
            except Unwanted:
                continue
        self._damaged = self._holdings.damaged_chunks
        if failed:
            self._mended()

    def _mend_save(self, save: Save) -> None:
        for name, index in self._holdings.unsound(save, lambda: self._check(save)):
            payload = self._peers.fetch(save, name, index)
            if payload is None:
                _log.error(
                    "chunk %d of %s of %s (save %s) is damaged here, and no other server that answers has it",
                    *(index, name, save.key, save.save_id),
                )
                continue
            self._check(save)
            self._holdings.mend(save, name, index, payload)
            self._mended_chunks += 1
            _log.warning(
                "chunk %d of %s of %s (save %s) was damaged here: it was fetched from another server",
                *(index, name, save.key, save.save_id),
            )
