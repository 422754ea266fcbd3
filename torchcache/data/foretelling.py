"""A reader's order, told to the pool: in a thread of its own, for as long as there is something to tell or to stage."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from torchcache.data.chunk_table import ChunkTable, Ints
from torchcache.data.epoch_plan import EpochPlan, Share
from torchcache.data.prefetch import Missing, Prefetch, PrefetchProgress
from torchcache.errors import ConfigurationError, ServerUnavailable, TorchCacheError, TransientError
from torchcache.model import Extent
from torchcache.placement import Placement
from torchcache.pool import Pool
from torchcache.pool.orders import OrderKey

_log = logging.getLogger("torchcache")

COMING_S: Final = 0.03
"""How long until it is asked again, while chunks are coming,"""

LATER_S: Final = 0.1
"""while there is no room for them,"""

IDLE_S: Final = 1.0
"""while all are here, so that it is seen when the next epoch begins,"""

TROUBLE_S: Final = 1.0
"""while a server can't be asked."""

GIVE_UP_S: Final = 60.0
"""After so long without any answer."""

READ_S: Final = 60.0
UNREAD_S: Final = 900.0
"""How long an order is told without anything being read: at its end; before."""

_STOP_S: Final = 12.0

OrderOf = Callable[[int], Sequence[int] | Ints]
"""The samples read in an epoch, in their order."""


class Located(Protocol):
    """What samples are asked for here."""

    def __len__(self) -> int: ...

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        """Where the samples lie."""


class OrderedPrefetch(Prefetch):
    """Made by `CachedDataset.prefetch` of objects that an under-store holds."""

    def __init__(
        self, order_of: OrderOf, *, told_from: int, first: int, last: int | None, running: int | None
    ) -> None:
        """`first` to `last` are staged, and from `told_from` on told. `running` is the epoch that runs, if known."""
        self.order_of, self.told_from, self.first, self.last = order_of, told_from, first, last
        self.running = running
        self.plans: dict[int, EpochPlan] = {}
        self.now = told_from  # the epoch that runs, by what servers say
        self.reached = (0, -1)
        self.reached_s = time.monotonic()
        self.names: dict[str, str] = {}  # servers' addresses
        self._changed = threading.Condition()
        self._state = "running"
        self.wake: Callable[[], object] = lambda: None
        self._error: TorchCacheError | None = None

    # ---- for its owner ----

    @property
    def total(self) -> int:
        plan = self._plan
        return len(plan) if plan is not None else 0

    @property
    def staged(self) -> int:
        plan = self._plan
        return plan.staged if plan is not None else 0

    @property
    def staged_bytes(self) -> int:
        plan = self._plan
        return plan.staged_bytes if plan is not None else 0

    @property
    def _plan(self) -> EpochPlan | None:
        """Of the epoch that is being staged, or was last."""
        plans = [plan for epoch, plan in sorted(self.plans.items()) if epoch >= self.first]
        return next((plan for plan in plans if not plan.is_done), plans[-1] if plans else None)

    def done(self) -> bool:
        return self._state != "running"

    def cancel(self) -> None:
        self.end("cancelled")
        self.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.done() or self._is_as_far_as_can_be(), timeout_s)
        if self._error is not None:
            raise self._error
        return self.done()

    def progress(self) -> PrefetchProgress:
        plan = self._plan
        if plan is None:
            return PrefetchProgress(
                epoch=self.first, samples=0, staged=0, staged_bytes=0, ahead_bytes=0, position=-1
            )
        reached = max((share.reached for share in plan.shares), default=(0, -1))
        staged = plan.staged
        return PrefetchProgress(
            epoch=plan.epoch,
            samples=len(plan),
            staged=staged,
            staged_bytes=plan.staged_bytes,
            ahead_bytes=sum(share.ahead_bytes for share in plan.shares),
            position=reached[1] if reached[0] == plan.epoch else -1,
            eta_s=_eta_s(plan, staged),
            missing=tuple(
                Missing(server=self.names.get(server, server), chunks=count, why=why)
                for (server, why), count in sorted(plan.missing().items())
            ),
        )

    # ---- for the thread ----

    def end(self, state: str, error: TorchCacheError | None = None) -> None:
        """It is over, once."""
        with self._changed:
            if self._state in ("running", "done"):
                self._state, self._error = state, error or self._error
            self._changed.notify_all()

    def moved(self) -> None:
        """Lets who waits look again."""
        with self._changed:
            self._changed.notify_all()

    @property
    def is_wanted(self) -> bool:
        """Whether its orders are to be told still; they are after all is staged."""
        return self._state in ("running", "done")

    def _is_as_far_as_can_be(self) -> bool:
        plan = self._plan
        return plan is not None and all(share.is_done or share.is_late for share in plan.shares)


def _eta_s(plan: EpochPlan, staged: int) -> float | None:
    """How long the rest of this epoch takes at the pace of what is staged of it; None if that can't be said yet."""
    if plan.is_done:
        return 0.0
    if plan.began_s is None or not staged:
        return None
    return (len(plan) - staged) * (time.monotonic() - plan.began_s) / staged


class Foreteller:
    """Of one dataset in one process: the id of its order, and the thread that tells it."""

    def __init__(self, pool: Pool, namespace: str, samples: Located) -> None:
        self.key = OrderKey(namespace, secrets.token_hex(16))
        self.pid = os.getpid()
        self._pool = pool
        self._samples = samples
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._prefetches: list[OrderedPrefetch] = []
        self._thread: threading.Thread | None = None
        self._table: ChunkTable | None = None
        self._servers: dict[str, str] = {}
        self._placement = Placement(())
        self._answered_s = time.monotonic()

    def add(self, prefetch: OrderedPrefetch) -> None:
        """Goes on with this one; an older one of the same epochs ends."""
        prefetch.wake = self._wake.set
        with self._lock:
            for other in self._prefetches:
                if other.first >= prefetch.first:
                    other.cancel()
            self._prefetches = [p for p in self._prefetches if p.is_wanted] + [prefetch]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="torchcache-prefetch", daemon=True)
                # The interpreter must not pull gRPC from under a call.
                atexit.register(self.stop)
                self._answered_s = time.monotonic()
                self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Ends it all. What is being fetched arrives; the pool forgets the order."""
        if self.pid != os.getpid():
            return  # a child that ends: the thread is its parent's, and may have held these events' locks at the fork
        self._stopped.set()
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            pause_s = 0.0
            while not self._stopped.is_set():
                self._wake.wait(pause_s)
                self._wake.clear()
                with self._lock:
                    self._prefetches = [p for p in self._prefetches if p.is_wanted]
                    if not self._prefetches:
                        self._left()
                        break
                    prefetches = list(self._prefetches)
                pause_s = self._round(prefetches)
        except Exception as error:  # noqa: BLE001 - of the user's sampler; kept for wait
            failure = TorchCacheError(f"prefetch stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            _log.warning("%s", failure, exc_info=error)
            self._end_all(failure)
        finally:
            with self._lock:
                undone = self._left()
            for prefetch in undone:
                prefetch.cancel()
            if self._thread is None:
                self._forget()

    def _left(self) -> list[OrderedPrefetch]:
        """What the thread leaves undone. Under the lock: whoever adds one from then on starts another thread."""
        if self._thread is not threading.current_thread():
            return []  # it left before, and what there is now is of the next
        atexit.unregister(self.stop)
        self._thread = None
        undone, self._prefetches = self._prefetches, []
        return undone

    def _end_all(self, error: TorchCacheError) -> None:
        for prefetch in self._prefetches:
            prefetch.end("failed", error)

    def _round(self, prefetches: Sequence[OrderedPrefetch]) -> float:
        """Tells and asks once; returns after how long to do so again."""
        if self._servers and not self._pool.is_open:
            self._end_all(ServerUnavailable("the pool was closed, and the prefetch ends with it"))
            return 0.0
        try:
            # Once it was open it isn't opened again from here: whoever closes an embedded pool ends its servers.
            servers = self._pool.servers(opens=not self._servers)
            placement = self._pool.placement(servers, opens=False)
            if servers != self._servers or placement != self._placement:
                self._servers, self._placement, self._table = servers, placement, None
                for prefetch in prefetches:
                    prefetch.plans = {}  # others own its chunks now
            if self._table is None:
                self._table = ChunkTable(
                    self._samples.extents, len(self._samples), placement, stopped=self._stopped.is_set
                )
                self._answered_s = time.monotonic()
        except TransientError as error:
            self._give_up_late(error)
            return TROUBLE_S
        if self._stopped.is_set():
            return 0.0
        pause_s = IDLE_S
        for prefetch in prefetches:
            try:
                pause_s = min(pause_s, self._go_on(prefetch))
            except TransientError as error:
                self._give_up_late(error)
                pause_s = TROUBLE_S
            except TorchCacheError as error:
                _log.warning(
                    "prefetch stopped after %d of %d samples: %s", prefetch.staged, prefetch.total, error
                )
                prefetch.end("failed", error)
            prefetch.moved()
        return pause_s

    def _give_up_late(self, error: TransientError) -> None:
        if time.monotonic() - self._answered_s > GIVE_UP_S:
            _log.warning("prefetch stopped: %s", error)
            self._end_all(error)

    def _go_on(self, prefetch: OrderedPrefetch) -> float:
        prefetch.names = self._servers
        self._plan(prefetch)
        plans = [plan for _, plan in sorted(prefetch.plans.items())]
        for plan in plans:
            for share in plan.shares:
                self._tell(plan, share)
        pause_s = IDLE_S
        for plan in plans:
            # A later epoch waits until all of this one is asked for: the pool's room is for what is needed first.
            stages = plan.epoch >= prefetch.first and all(
                p.is_done for p in plans if prefetch.first <= p.epoch < plan.epoch
            )
            if stages and plan.began_s is None:
                plan.began_s = time.monotonic()
            for share in plan.shares:
                pause_s = min(pause_s, self._step(prefetch, plan, share, stages=stages))
        self._look_at_end(prefetch)
        return pause_s

    def _plan(self, prefetch: OrderedPrefetch) -> None:
        """Makes the plans of the epoch that runs and of the next; lets go those that are over."""
        now = self._now(prefetch)
        table = self._table
        if table is None:
            return
        last = now + 1 if prefetch.last is None else min(prefetch.last, max(now + 1, prefetch.first))
        for epoch in range(max(now, prefetch.told_from), last + 1):
            if epoch not in prefetch.plans:
                order = prefetch.order_of(epoch)
                is_running = epoch == prefetch.running or (epoch == now > prefetch.told_from)
                prefetch.plans[epoch] = EpochPlan(
                    self.key, epoch, order, table, self._placement.members, running=is_running
                )
        prefetch.plans = {
            epoch: plan for epoch, plan in prefetch.plans.items() if epoch >= now or epoch == last
        }

    def _now(self, prefetch: OrderedPrefetch) -> int:
        """The epoch that runs, by what servers say."""
        shares = [share for plan in prefetch.plans.values() for share in plan.shares]
        prefetch.now = max([prefetch.now, *(epoch for epoch, at in (s.reached for s in shares) if at > 0)])
        return prefetch.now

    def _tell(self, plan: EpochPlan, share: Share) -> None:
        if share.told or time.monotonic() < share.asked_s + TROUBLE_S:
            return
        try:
            self._pool.tell_order(share.server, plan.told(share))
            share.told, share.trouble = True, None
        except TransientError as error:
            self._trouble(share, error)

    def _step(self, prefetch: OrderedPrefetch, plan: EpochPlan, share: Share, *, stages: bool) -> float:
        if not share.told or (share.trouble is not None and time.monotonic() < share.asked_s + TROUBLE_S):
            return TROUBLE_S
        numbers = plan.window(share) if stages else []
        if not numbers and time.monotonic() < share.asked_s + IDLE_S:
            return IDLE_S
        wanted = plan.wanted(share, numbers)
        try:
            reply = self._pool.stage_ahead(
                share.server, self.key, plan.epoch, wanted, running=prefetch.running
            )
        except TransientError as error:
            self._trouble(share, error)
            return TROUBLE_S
        share.asked_s = self._answered_s = time.monotonic()
        share.trouble = None
        if reply is None:
            share.told = False  # it was started anew, or we were silent for too long
            return COMING_S
        has_moved = plan.answered(share, numbers, wanted, reply)
        if has_moved and not share.is_held_up:
            return 0.0
        return LATER_S if share.is_late else COMING_S if share.open else IDLE_S

    def _trouble(self, share: Share, error: TransientError) -> None:
        share.trouble, share.asked_s = error, time.monotonic()
        self._give_up_late(error)

    def _look_at_end(self, prefetch: OrderedPrefetch) -> None:
        plans = prefetch.plans
        if prefetch.last is None or prefetch.last not in plans:
            return
        if prefetch.done():
            self._leave_late(prefetch, plans[prefetch.last])
            return
        staged = [plan for epoch, plan in plans.items() if epoch >= prefetch.first]
        if all(plan.is_done for plan in staged):
            failed = [error for plan in staged for share in plan.shares for error in share.failed.values()]
            if failed:
                _log.warning("prefetch: %d chunks can't be staged; the first: %s", len(failed), failed[0])
            prefetch.end("done", failed[0] if failed else None)

    def _leave_late(self, prefetch: OrderedPrefetch, plan: EpochPlan) -> None:
        """Nobody tells an order for ever whose end was read, or of which nothing more is read."""
        now_s = time.monotonic()
        epoch, position = reached = max((share.reached for share in plan.shares), default=(0, 0))
        if reached != prefetch.reached:
            prefetch.reached, prefetch.reached_s = reached, now_s
        at_end = epoch > plan.epoch or (epoch == plan.epoch and position >= len(plan) * 9 // 10)
        if now_s - prefetch.reached_s > (READ_S if at_end else UNREAD_S):
            prefetch.end("left")

    def _forget(self) -> None:
        for server in self._servers:
            try:
                self._pool.forget_order(server, self.key)
            except TorchCacheError as error:
                _log.debug("an order is left to be forgotten by itself: %s", error)


def ordered(order_of: OrderOf, *, epoch: int, epochs: int | None, running: int | None) -> OrderedPrefetch:
    """Of `epoch` and those behind it, `epochs` in all or without end. `running`: what the reader is set to, if known.

    Raises ConfigurationError for a number of epochs that is none.
    """
    if epochs is not None and epochs < 1:
        raise ConfigurationError(f"epochs={epochs}: it is a number above 0, or None for all that follow")
    return OrderedPrefetch(
        order_of,
        told_from=epoch - 1 if running == epoch - 1 else epoch,
        first=epoch,
        last=None if epochs is None else epoch + epochs - 1,
        running=running if running in (epoch - 1, epoch) else None,
    )


def foreteller_of(owner: object, pool: Pool, namespace: str, samples: Located) -> Foreteller:
    """A foreteller that ends with its owner."""
    made = Foreteller(pool, namespace, samples)
    weakref.finalize(owner, made.stop).atexit = False
    return made
