"""Keeps what isn't durable yet on as many servers as hold it by its commit, and each of them sound.

The server that is to upload a save, as the claim says, asks the others now and then who has it. Where that is too few
for longer than a grace, the next in order get a copy. A chunk that is damaged here is fetched from another server. See
docs/decisions/0025-the-owner-makes-lost-copies-again.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from torchcache.errors import IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.model import ObjectInfo
from torchcache_server.cache.claims import DEAD_AFTER_LEASES
from torchcache_server.cache.holdings import Holdings
from torchcache_server.cache.recopy_plan import Watch, begin, is_due, is_short
from torchcache_server.cache.saves import Save
from torchcache_server.service.counters import CopyCounts

if TYPE_CHECKING:
    from .peers import Peers

RATE_BYTES_S: Final = 256 * 1024 * 1024
"""At most so much is copied, by one thread: readers and savers come first."""

REFUSED_S: Final = 600.0
"""A server that could not take a copy isn't asked to again for so long: it may be full, or damaged."""
AWAY_S: Final = 60.0
"""And one that couldn't be reached."""

CLAIM_S: Final = 5.0
SILENT_S: Final = CLAIM_S / 2
"""An under-store that takes longer to show a claim isn't asked for others in the same round."""
CLOSE_S: Final = 3.0

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """The server closes."""


class Unwanted(Exception):
    """The save is durable by now, or gone."""


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
        self._looked = False  # who serves, in this round
        self._silent: set[str] = set()  # under-stores that didn't show a claim in this round
        self._damaged = 0  # chunks, when all was looked through last, or fewer by now
        self._suspects: list[Save] = []  # damaged, it was found when they were sent: for the next round
        self._unsound: dict[str, Save] = {}  # damaged, or not yet looked through: after the grace again
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
        """Begins nothing more, and ends what runs between two calls, or in one of another server's; idempotent."""
        self._closed.set()
        self._peers.close()
        self._thread.join(CLOSE_S)
        self._peers.close()  # it may have been on its way to another

    def _run(self) -> None:
        while not self._closed.wait(self._lease_s):
            try:
                self._round()
            except Stopped:
                return

    def _round(self) -> None:
        """Raises Stopped."""
        self._looked = False
        self._silent.clear()
        for work in (self._mend, self._copy):
            try:
                work()
            except Stopped:
                raise
            except TorchCacheError as error:
                if self._closed.is_set():
                    raise Stopped from None
                _log.warning("copies of checkpoints can't be looked after now: %s", error)
            except Exception:  # noqa: BLE001 - logged; the next round may fare better
                if self._closed.is_set():  # the connections went under its hands
                    raise Stopped from None
                _log.exception("looking after copies of checkpoints met an error nobody foresaw")

    def _look(self) -> None:
        """Asks who serves, once a round. Raises ServerUnavailable if none answers, Stopped."""
        if self._closed.is_set():
            raise Stopped
        if not self._looked:
            self._peers.look()
            self._looked = True

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
                self._look()
                try:
                    self._keep_up(one.save, watch)
                except Unwanted:
                    continue
                except TorchCacheError as error:
                    _log.warning("copies of %s can't be looked after now: %s", one.save.key, error)

    def _keep_up(self, save: Save, watch: Watch) -> None:
        if not self._is_responsible(save):
            return
        holders: set[str] = set()
        for server in self._peers.others(save):
            self._check(save)
            if len(holders) + 1 < watch.wanted and self._peers.holds(server, save):
                holders.add(server)
        watch = watch.found(1 + len(holders), time.monotonic())
        self._watches[save.save_id] = watch
        if not is_short(watch, now_s=time.monotonic(), grace_s=self._grace_s):
            return
        for server in self._peers.others(save):  # without those that were just found to be silent
            if server in holders or (save.save_id, server) in self._refused:
                continue
            if watch.held >= watch.wanted or save.save_id in self._unsound:
                break
            self._check(save)
            _log.warning(
                "%s (save %s) isn't in the under-store yet, and %d servers have it, not %d: it is copied to server %s",
                *(save.key, save.save_id, watch.held, watch.wanted, self._peers.address(server)),
            )
            if self._send(server, save):
                watch = watch.found(watch.held + 1, time.monotonic())
                self._watches[save.save_id] = watch

    def _is_responsible(self, save: Save) -> bool:
        """Where claims can't be read, which takes a while to find out, by what was known before."""
        if save.key.store in self._silent:
            return True
        began_s = time.monotonic()
        is_responsible = self._holdings.is_responsible(save, deadline=began_s + CLAIM_S)
        if time.monotonic() - began_s > SILENT_S:
            self._silent.add(save.key.store)
        return is_responsible

    def _send(self, server: str, save: Save) -> bool:
        began_s, total = time.monotonic(), 0
        is_sound = True

        def chunks(object: ObjectInfo) -> Iterator[tuple[int, pa.Buffer]]:
            nonlocal is_sound
            try:
                yield from self._holdings.chunks(object)
            except IntegrityError:
                is_sound = False
                raise

        def sent(size: int) -> None:
            nonlocal total
            total += size
            self._closed.wait(began_s + total / RATE_BYTES_S - time.monotonic())
            self._check(save)

        try:
            self._peers.send(server, save, chunks, sent)
        except TorchCacheError as error:
            self._check(save)
            _log.warning("%s can't be copied to server %s: %s", save.key, self._peers.address(server), error)
            if not is_sound:  # which isn't the other's fault
                self._suspects.append(save)
                self._unsound[save.save_id] = save
                return False
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
        """Looks through what was found damaged by who read it; through all, if the store knows of more damage."""
        failed = [one.save for one in self._holdings.waiting() if isinstance(one.save.error, IntegrityError)]
        suspects = self._holdings.take_reported() + self._suspects
        self._suspects = []
        now_s, damaged = time.monotonic(), self._holdings.damaged_chunks
        if now_s >= self._mend_again_s and (failed or self._unsound):
            suspects += [*failed, *self._unsound.values()]
            self._mend_again_s = now_s + self._grace_s
        if damaged > self._damaged:
            suspects = self._holdings.all()
        self._damaged = min(self._damaged, damaged)
        if not suspects:
            return
        found = {save.save_id: save for save in suspects}
        self._unsound.update(found)
        try:
            for save in found.values():
                if self._mend_save(save):
                    del self._unsound[save.save_id]
        finally:
            self._damaged = self._holdings.damaged_chunks
        if failed:
            self._mended()

    def _mend_save(self, save: Save) -> bool:
        """Whether nothing of it is damaged any more, or nobody wants it. Raises as `_look`."""
        is_sound = True
        try:
            for name, index in self._holdings.unsound(save, lambda: self._check(save)):
                self._look()
                is_sound &= self._mend_chunk(save, name, index)
        except Unwanted:
            return True
        return is_sound

    def _mend_chunk(self, save: Save, name: str, index: int) -> bool:
        """Whether it could be mended."""
        chunk = (index, name, save.key, save.save_id)
        try:
            payload = self._peers.fetch(save, name, index)
            self._check(save)
            if payload is None:
                _log.error(
                    "chunk %d of %s of %s (save %s) is damaged here, and no other server that answers has it",
                    *chunk,
                )
                return False
            self._holdings.mend(save, name, index, payload)
        except TorchCacheError as error:
            self._check(save)
            _log.error("chunk %d of %s of %s (save %s) is damaged here, and stays so: %s", *chunk, error)
            return False
        self._mended_chunks += 1
        _log.warning(
            "chunk %d of %s of %s (save %s) was damaged here: it was fetched from another server", *chunk
        )
        return True
