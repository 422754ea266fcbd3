"""One checkpoint put back into a state: found fit on all ranks first, then loaded, then handed over."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from torchcache.checkpoint.agreement import Ranks, plain_errors
from torchcache.checkpoint.reader import CacheStorageReader
from torchcache.checkpoint.resume import (
    Record,
    go_to,
    is_loader,
    record_name,
    require_same_data,
    set_rng_state,
)
from torchcache.checkpoint.stored import Backing
from torchcache.checkpoint.targets import complete, give_back, prepare
from torchcache.errors import CheckpointError

_log = logging.getLogger(__name__)


def restore(reader: CacheStorageReader, state: MutableMapping[str, Any], ranks: Ranks, *, rng: bool) -> None:
    """Puts what `reader` reads into `state`, see CheckpointManager.load. Called by all ranks, raises on all."""
    uri = str(reader.path)
    opened: list[Backing] = []
    with ExitStack() as until_loaded:

        def open_it() -> None:
            opened.append(reader.backing(reader.read_metadata()))
            # torch opens it again for every load, and the reader ends its own hold with each.
            if (hold := reader.give_hold()) is not None:
                until_loaded.enter_context(hold.kept())

        ranks.all_or_none(open_it)
        _load_all(reader, opened[0], uri, state, ranks, rng=rng)


def _load_all(
    reader: CacheStorageReader,
    backing: Backing,
    uri: str,
    state: MutableMapping[str, Any],
    ranks: Ranks,
    *,
    rng: bool,
) -> None:
    record = _read_record(reader, backing, state, uri, ranks)
    if record is None and rng:
        _log.warning("%s has no state of random generators for this rank: they stay as they are", uri)
    targets: dict[str, Any] = {}

    def make_targets() -> None:
        for key, value in state.items():
            if not is_loader(value):
                targets[key] = prepare(value, backing.metadata, key)
        complete(targets, backing)

    ranks.all_or_none(make_targets)
    with plain_errors():
        load(targets, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)

    def hand_over() -> None:
        for key, value in list(state.items()):
            if key in targets:
                give_back(state, key, targets[key])
            elif record is not None:
                go_to(value, record.positions[key])
        if rng and record is not None and record.rng is not None:
            set_rng_state(record.rng)

    ranks.all_or_none(hand_over)


def _read_record(
    reader: CacheStorageReader,
    backing: Backing,
    state: MutableMapping[str, Any],
    uri: str,
    ranks: Ranks,
) -> Record | None:
    """This rank's own part of the checkpoint, found fit for `state` on all ranks; None if it is another world's."""
    found: list[Record] = []

    def read() -> None:
        name = record_name(ranks.rank)
        entry = backing.metadata.state_dict_metadata.get(name)
        if isinstance(entry, TensorStorageMetadata):
            backing.require([name])
            place = {name: torch.empty(entry.size, dtype=torch.uint8, device="cpu")}
            with plain_errors():
                load(place, storage_reader=reader, no_dist=True)
            record = Record.decode(place[name], where=uri)
            require_same_data(record.datasets, state, uri)
            if record.world_size == ranks.size:
                found.append(record)
        positions = found[0].positions if found else {}
        if lacking := [key for key, value in state.items() if is_loader(value) and key not in positions]:
            raise CheckpointError(
                f"{uri} has no position for {', '.join(map(repr, lacking))} on rank {ranks.rank} of {ranks.size}: it "
                "was saved without, or by another number of ranks. Load without it, and say where to go on yourself",
                object=uri,
            )

    ranks.all_or_none(read)
    return found[0] if found else None
