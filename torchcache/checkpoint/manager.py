"""CheckpointManager: the checkpoints of one run, from the first save to the resume after a kill."""

from __future__ import annotations

import builtins
import functools
import logging
import os
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchcache.checkpoint.agreement import Ranks, as_ours
from torchcache.checkpoint.durable import wait_until_durable
from torchcache.checkpoint.location import checkpoint_uri
from torchcache.checkpoint.pending import PendingSave
from torchcache.checkpoint.reader import CacheStorageReader
from torchcache.checkpoint.resume import (
    PREFIX,
    Record,
    go_to,
    identity_of,
    is_loader,
    position_of,
    record_name,
    require_same_data,
    rng_state,
    set_rng_state,
)
from torchcache.checkpoint.retention import Step, superfluous
from torchcache.checkpoint.run import list_steps, require_whole, step_uri
from torchcache.checkpoint.stager import StagedSave, Stager
from torchcache.checkpoint.targets import as_dict, complete, give_back, prepare
from torchcache.checkpoint.writer import CacheStorageWriter, Durability
from torchcache.connecting import connect
from torchcache.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    NotCommitted,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.local_pool import LocalPool
from torchcache.pool import Pool

_log = logging.getLogger(__name__)

# A single process is nothing to warn of at every save. (Filters can't be changed for one thread alone.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

RETENTION_S: Final = 30.0
"""How long a save waits for the files of an old checkpoint to go; the pool goes on without it."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run, `<root>/step-<n>`, and deletes those that are not needed any more.

    `root`, `pool` and `durability` are as for CacheStorageWriter. `keep_last` checkpoints stay (None: all), and each
    whose step is a multiple of `keep_every`; and always the newest that is durable, and any that somebody is reading.

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
        rng: bool = True,
    ) -> None:
        for name, count in (("keep_last", keep_last), ("keep_every", keep_every)):
            if count is not None and (type(count) is not int or count < 1):
                raise ConfigurationError(f"{name} must be a number from 1 on, or None, not {count!r}")
        self.root = checkpoint_uri(root)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._pool = connect(pool)
        self._durability: Durability = durability
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
        self._write(self._content(state), writer)

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
                self._write(staged, writer)
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
        return CacheStorageWriter(uri, pool=self._pool, durability=self._durability, overwrite=overwrite)

    def _write(self, content: dict[str, Any], writer: CacheStorageWriter) -> None:
        with _plain_errors():
            save(
                content,
                storage_writer=writer,
                process_group=self._ranks.group,
                no_dist=self._ranks.size == 1,
            )
        self._retain()

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
        candidates = [_checked(step)] if step is not None else self._ranks.decide(self._restorable)
        for number in candidates:
            uri = step_uri(self.root, number)
            try:
                self._ranks.decide(functools.partial(require_whole, self._pool, uri))
                self._load(state, uri)
                return number
            except (IntegrityError, NotCommitted, ObjectNotFound) as error:
                if step is not None:
                    raise
                _log.warning("step %d is passed over: %s", number, error)
        raise NotCommitted(f"there is no checkpoint under {self.root} that can be restored", object=self.root)

    def _load(self, state: MutableMapping[str, Any], uri: str) -> None:
        reader = CacheStorageReader(uri, pool=self._pool)
        opened: list[Metadata] = []
        self._ranks.all_or_none(lambda: opened.append(reader.read_metadata()))
        record = self._read_record(reader, opened[0], state, uri)
        targets: dict[str, Any] = {}

        def make_targets() -> None:
            for key, value in state.items():
                if not is_loader(value):
                    targets[key] = prepare(value, opened[0], key)
            complete(targets, opened[0])

        self._ranks.all_or_none(make_targets)
        with _plain_errors():
            load(
                targets,
                storage_reader=reader,
                process_group=self._ranks.group,
                no_dist=self._ranks.size == 1,
            )

        def hand_over() -> None:
            for key, value in list(state.items()):
                if key in targets:
                    give_back(state, key, targets[key])
                elif record is not None:
                    go_to(value, record.positions[key])
            if self._rng and record is not None and record.rng is not None:
                set_rng_state(record.rng)

        self._ranks.all_or_none(hand_over)

    def _read_record(
        self, reader: CacheStorageReader, metadata: Metadata, state: MutableMapping[str, Any], uri: str
    ) -> Record | None:
        """This rank's own part of the checkpoint, found fit for `state` on all ranks; None if it is another world's."""
        found: list[Record] = []

        def read() -> None:
            name = record_name(self._ranks.rank)
            entry = metadata.state_dict_metadata.get(name)
            if isinstance(entry, TensorStorageMetadata):
                place = {name: torch.empty(entry.size, dtype=torch.uint8, device="cpu")}
                with _plain_errors():
                    load(place, storage_reader=reader, no_dist=True)
                record = Record.decode(place[name], where=uri)
                require_same_data(record.datasets, state, uri)
                if record.world_size == self._ranks.size:
                    found.append(record)
            loaders = [key for key, value in state.items() if is_loader(value)]
            positions = found[0].positions if found else {}
            if lacking := [key for key in loaders if key not in positions]:
                raise CheckpointError(
                    f"{uri} has no position for {', '.join(map(repr, lacking))} on rank {self._ranks.rank} of "
                    f"{self._ranks.size}: it was saved without, or by another number of ranks. Load without it, and "
                    "say where to go on yourself",
                    object=uri,
                )

        self._ranks.all_or_none(read)
        if not found and self._rng:
            _log.warning("%s has no state of random generators for this rank: they stay as they are", uri)
        return found[0] if found else None

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
        for step in superfluous(steps, keep_last=self.keep_last, keep_every=self.keep_every):
            try:
                self._pool.delete_save(*self._pool.resolve(step.uri), timeout_s=RETENTION_S)
                _log.info("step %d is deleted", step.step)
            except TorchCacheError as error:
                _log.warning("step %d stays for now: %s", step.step, error)


def _checked(step: object) -> int:
    if type(step) is not int or step < 0:
        raise ConfigurationError(f"a step is a number from 0 on, not {step!r}")
    return step


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What torch gathered of all ranks as the error of the lowest one."""
    try:
        yield
    except CheckpointException as gathered:
        rank, (cause, _) = min(gathered.failures.items(), key=lambda failure: failure[0])
        error = as_ours(cause)
        raise type(error)(
            f"rank {rank}: {error.message}" if len(gathered.failures) > 1 or rank else error.message,
            object=error.object,
            server=error.server,
        ) from cause
