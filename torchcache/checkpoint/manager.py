"""CheckpointManager: the checkpoints of one run, from the first save to the resume after a kill."""

from __future__ import annotations

import builtins
import functools
import logging
import os
import threading
from collections.abc import MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from torchcache.checkpoint.agreement import Ranks, plain_errors
from torchcache.checkpoint.compression import Zstd
from torchcache.checkpoint.durable import wait_until_durable
from torchcache.checkpoint.host_memory import EXTRA_MEMORY_BYTES, checked_bound
from torchcache.checkpoint.location import checkpoint_uri
from torchcache.checkpoint.pending import PendingSave
from torchcache.checkpoint.planning import Planner
from torchcache.checkpoint.reader import CacheStorageReader
from torchcache.checkpoint.restoring import restore
from torchcache.checkpoint.resume import (
    PREFIX,
    Record,
    identity_of,
    is_loader,
    position_of,
    record_name,
    rng_state,
)
from torchcache.checkpoint.retention import Step, superfluous
from torchcache.checkpoint.run import list_steps, require_whole, step_uri
from torchcache.checkpoint.stager import StagedSave, Stager
from torchcache.checkpoint.targets import as_dict
from torchcache.checkpoint.writer import CacheStorageWriter, Durability
from torchcache.connecting import connect
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotCommitted,
    ObjectNotFound,
    OutOfSpace,
    TorchCacheError,
)
from torchcache.local_pool import LocalPool
from torchcache.pool import Pool

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

_log = logging.getLogger(__name__)

RETENTION_S: Final = 30.0
"""How long a save waits for the files of an old checkpoint to go; the pool goes on without it."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run, `<root>/step-<n>`, and deletes those that are not needed any more.

    `root`, `pool`, `durability`, `replicas`, `compression`, `extra_memory_bytes`, `reuse_unchanged` and `_extensions`
    are as for CacheStorageWriter, `extra_memory_bytes` and `_extension_registry` as for CacheStorageReader.

    `keep_last` checkpoints stay (None: all), and each whose step is a multiple of `keep_every`; and always the newest
    that is durable, any that somebody is reading, and the one just saved: also of a run that went back to an earlier
    step, for which a warning says that `latest` is still of the way it left.

    The state is a dict: modules, optimizers, schedulers and whatever else has state_dict and load_state_dict, tensors,
    plain values. A StatefulDataLoader in it is each rank's own. With `rng` the global random generators of torch, numpy
    and Python of every rank belong to it. `load` puts all of it back as `save` found it; nothing else is committed with
    it, and none of it without the rest.

    Under torch.distributed every method is called by all ranks, in the same order: rank 0 decides. What lies at a step
    is a stock DCP checkpoint. Raises ConfigurationError.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        pool: str | Pool | LocalPool | None = None,
        durability: Durability = "pool",
        replicas: int | None = None,
        compression: str | Zstd | None = None,
        extra_memory_bytes: int = EXTRA_MEMORY_BYTES,
        reuse_unchanged: bool = True,
        rng: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        _extension_registry: ExtensionRegistry | None = None,
    ) -> None:
        for name, count in (("keep_last", keep_last), ("keep_every", keep_every)):
            if count is not None and (type(count) is not int or count < 1):
                raise ConfigurationError(f"{name} must be a number from 1 on, or None, not {count!r}")
        self.root = checkpoint_uri(root)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._pool = connect(pool)
        self._durability: Durability = durability
        self._replicas = replicas
        self._compression = Zstd.of(compression)
        self._extra_memory_bytes = checked_bound(extra_memory_bytes)
        self._reuse_unchanged = reuse_unchanged
        self._extensions = _extensions
        self._extension_registry = _extension_registry
        self._writer(0, overwrite=False)  # what it refuses is refused here
        # Both stay, whatever lies behind them: what was loaded until what was saved after it is durable.
        self._saved: int | None = None
        self._loaded: int | None = None
        self._warned = False
        self._rng = rng
        self._made_ranks: Ranks | None = None
        self._stager = Stager()
        self._under_way: PendingSave | None = None

    def __repr__(self) -> str:
        return f"CheckpointManager({self.root!r}, keep_last={self.keep_last}, keep_every={self.keep_every})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # after an error the other ranks may never come here
            self.close()

    def close(self) -> None:
        """Waits for a `save_async` and gives back its memory; the manager may be used again. Raises what that met."""
        self._finish_pending()
        self._stager.close()
        ranks, self._made_ranks = self._made_ranks, None
        if ranks is not None:
            ranks.close()

    @property
    def _ranks(self) -> Ranks:
        if self._made_ranks is None:
            self._made_ranks = Ranks()
        return self._made_ranks

    # ---- saving ----

    def save(self, step: int, state: MutableMapping[str, Any], *, overwrite: bool = False) -> None:
        """Saves `state` as the checkpoint of `step`; when it returns, that can be restored, and old ones are deleted.

        Raises AlreadyExists if the step has one, unless `overwrite`; CheckpointError for a state that can't be saved,
        on all ranks if any has met it.
        """
        self._finish_pending()
        writer = self._writer(step, overwrite=overwrite)
        self._write(self._content(state), writer, step)

    def save_async(
        self, step: int, state: MutableMapping[str, Any], *, overwrite: bool = False
    ) -> Future[None]:
        """As `save`, but training stops only until `state` is copied, into memory that is used again by the next one.

        The future tells when the checkpoint can be restored, or raises what `save` would. One save runs at a time: the
        next, like every other method, waits for it first, and raises its error if nobody asked the future.
        """
        self._finish_pending()
        writer = self._writer(step, overwrite=overwrite)
        content = self._content(state)
        copied: builtins.list[tuple[dict[str, Any], StagedSave]] = []
        self._ranks.all_or_none(lambda: copied.append(self._stager.stage_save(content)))
        staged, staged_save = copied.pop()
        pending = self._under_way = PendingSave()

        def run() -> None:
            nonlocal staged
            try:
                self._write(staged, writer, step)
            except BaseException as error:  # noqa: BLE001 - the future's to raise
                pending.set_exception(error)
            else:
                pending.set_result(None)
            finally:
                staged = {}
                staged_save.release()

        pending.set_running_or_notify_cancel()
        threading.Thread(target=run, name="torchcache-save").start()
        return pending

    def _finish_pending(self) -> None:
        pending, self._under_way = self._under_way, None
        if pending is not None:
            pending.finish()

    def _writer(self, step: int, *, overwrite: bool) -> CacheStorageWriter:
        uri = step_uri(self.root, _checked(step))
        return CacheStorageWriter(
            uri,
            pool=self._pool,
            durability=self._durability,
            replicas=self._replicas,
            compression=self._compression,
            extra_memory_bytes=self._extra_memory_bytes,
            overwrite=overwrite,
            reuse_unchanged=self._reuse_unchanged,
            _extensions=self._extensions,
        )

    def _write(self, content: dict[str, Any], writer: CacheStorageWriter, step: int) -> None:
        try:
            self._save(content, writer)
        except OutOfSpace as error:
            # What it could borrow stays in the pool, of which another one may have the room: that borrows nothing.
            if not self._ranks.decide(lambda: writer.may_have_borrowed):
                raise
            _log.info("step %d is saved once more, and borrows nothing: %s", step, error)
            self._save(content, writer)
        self._saved = step
        self._retain()

    def _save(self, content: dict[str, Any], writer: CacheStorageWriter) -> None:
        # torch's save, without a wrapper and a record of the log around each entry: `content` has no Stateful in it.
        writer.reset()
        with plain_errors(), closing(Planner()) as planner:
            _save_state_dict(
                content,
                storage_writer=writer,
                process_group=self._ranks.group,
                no_dist=self._ranks.size == 1,
                planner=planner,
            )

    def _content(self, state: MutableMapping[str, Any]) -> dict[str, Any]:
        """What is saved of `state` on this rank. Raises on all ranks if it can't be made on any."""
        content: dict[str, Any] = {}

        def gather() -> None:
            record = Record(world_size=self._ranks.size, rng=rng_state() if self._rng else None)
            for key, value in state.items():
                if not isinstance(key, str) or key.startswith(PREFIX):
                    raise ConfigurationError(f"{key!r} can't name an entry of the state")
                identity = identity_of(value)
                if identity is not None:
                    record.datasets[key] = identity
                if is_loader(value):
                    record.positions[key] = position_of(value)
                else:
                    content[key] = as_dict(value)
            content[record_name(self._ranks.rank)] = record.encode()

        self._ranks.all_or_none(gather)
        return content

    # ---- loading ----

    def load(self, state: MutableMapping[str, Any], step: int | None = None) -> int:
        """Puts the checkpoint of `step`, by default the latest that is whole, into `state`; returns its step.

        Tensors are filled where they are; what has load_state_dict is given its state; plain values are replaced. Of
        an entry that `state` has, all that was saved is loaded; one that it lacks is left out. A checkpoint that turns
        out damaged is passed over for the one before, with a warning, unless it was asked for.

        Raises NotCommitted if there is none, IntegrityError if it is damaged, CheckpointError if a dataset in `state`
        has changed since, or a data loader's position is that of another number of ranks.
        """
        self._finish_pending()
        if step is not None:
            self._load(state, _checked(step))
            return step
        passed_over: set[int] = set()
        # Those that were listed may be deleted meanwhile, as newer ones are saved.
        while candidates := [n for n in self._ranks.decide(self._restorable) if n not in passed_over]:
            for number in candidates:
                try:
                    self._load(state, number)
                    return number
                except (IntegrityError, NotCommitted, ObjectNotFound) as error:
                    passed_over.add(number)
                    _log.warning("step %d is passed over: %s", number, error)
        raise NotCommitted(f"there is no checkpoint under {self.root} that can be restored", object=self.root)

    def _load(self, state: MutableMapping[str, Any], step: int) -> None:
        uri = step_uri(self.root, step)
        self._ranks.decide(functools.partial(require_whole, self._pool, uri))
        reader = CacheStorageReader(
            uri,
            pool=self._pool,
            extra_memory_bytes=self._extra_memory_bytes,
            _extension_registry=self._extension_registry,
        )
        restore(reader, state, self._ranks, rng=self._rng)
        self._loaded = step

    # ---- looking ----

    def list(self) -> builtins.list[Step]:
        """All checkpoints of the run, by step, also those that are being written or can't be restored."""
        self._finish_pending()
        return self._ranks.decide(lambda: list_steps(self._pool, self.root))

    def latest(self) -> int | None:
        """The newest step that can be restored; None if there is none. Of one passed over a warning says why."""
        self._finish_pending()
        return self._ranks.decide(self._latest)

    def _latest(self) -> int | None:
        for step in self._restorable():
            try:
                require_whole(self._pool, step_uri(self.root, step))
            except (IntegrityError, NotCommitted) as error:
                _log.warning("step %d is passed over: %s", step, error)
            else:
                return step
        return None

    def _restorable(self) -> builtins.list[int]:
        """The steps that look restorable, the newest first."""
        steps = list_steps(self._pool, self.root)
        for step in steps:
            if step.state == "broken":
                _log.warning("step %d is passed over: %s", step.step, step.problem)
        return [step.step for step in reversed(steps) if step.restorable]

    def wait_durable(self, step: int | None = None, *, timeout_s: float | None = None) -> None:
        """Waits until the checkpoint of `step`, by default every one there is, lies in storage.

        Raises CheckpointError if an upload failed, DeadlineExceeded after `timeout_s`, NotCommitted if there is no such
        step.
        """
        self._finish_pending()
        numbers = None if step is None else [_checked(step)]
        self._ranks.decide(lambda: self._wait(numbers, timeout_s))
        self._retain()

    def _wait(self, numbers: builtins.list[int] | None, timeout_s: float | None) -> None:
        if numbers is None:
            steps = list_steps(self._pool, self.root)
            numbers = [s.step for s in steps if s.restorable and s.state != "durable"]
        for number in numbers:
            save = self._pool.get_save(*self._pool.resolve(step_uri(self.root, number)), manifest=False)
            wait_until_durable(self._pool, save, timeout_s=timeout_s)

    # ---- deleting ----

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of `step`, whatever retention says.

        Raises NotCommitted if there is none, InUse while somebody reads it.
        """
        self._finish_pending()
        where = self._pool.resolve(step_uri(self.root, _checked(step)))
        self._ranks.decide(lambda: self._pool.delete_save(*where))

    def _retain(self) -> None:
        """Deletes what is superfluous. What can't be deleted now is tried again after the next save."""
        if not self._ranks.decides:
            return
        try:
            steps = list_steps(self._pool, self.root)
        except TorchCacheError as error:
            _log.warning("%s can't be tidied now: %s", self.root, error)
            return
        self._warn_of_newer(steps)
        if any(step.step == self._saved and step.state == "durable" for step in steps):
            self._loaded = None
        needed = (self._saved, self._loaded)
        for step in superfluous(steps, keep_last=self.keep_last, keep_every=self.keep_every, needed=needed):
            try:
                self._pool.delete_save(*self._pool.resolve(step.uri), timeout_s=RETENTION_S)
                _log.info("step %d is deleted", step.step)
            except TorchCacheError as error:
                _log.warning("step %d stays for now: %s", step.step, error)

    def _warn_of_newer(self, steps: Sequence[Step]) -> None:
        """Once, of steps beyond the one just saved: of a run that went back to an earlier one."""
        saved, newer = self._saved, max((step.step for step in steps if step.restorable), default=0)
        if saved is not None and saved < newer and not self._warned:
            self._warned = True
            _log.warning(
                "step %d was saved, but %s goes on to step %d, which latest() and load() take: if this run goes "
                "another way from there, delete the steps behind it",
                *(saved, self.root, newer),
            )


def _checked(step: object) -> int:
    if type(step) is not int or step < 0:
        raise ConfigurationError(f"a step is a number from 0 on, not {step!r}")
    return step
