"""Lists by key: sorted, and compared, a part at a time. What a part takes of memory doesn't grow with the list."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from torchcache.data.manifest import BATCH_ROWS, Manifest
from torchcache.errors import IntegrityError

PART_ROWS: Final = 262_144
"""Rows that are sorted at a time, about: some 100 MB."""

MOST_PARTS: Final = 128
"""Each is an open file while a list is cut."""

_ASKED: Final = 64
"""Keys that are looked at for each cut."""

_KEYED: Final = pa.schema([("key", pa.large_binary()), ("id", pa.large_binary()), ("size", pa.int64())])


def by_key(manifest: Manifest, folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows by key, bytewise, as `Manifest.of_batches` takes them.

    `folder` is one for files of this call's own, of up to one and a half times the list, if that is long. Raises
    IntegrityError for a list that has a key twice.
    """
    left = _KEYED.empty_table()
    for part in _parts(manifest, folder):
        rows = pa.concat_tables([left, part]).combine_chunks()
        order = pc.sort_indices(rows["key"])
        _check_once(rows["key"].take(order))
        whole = len(order) - len(order) % BATCH_ROWS
        for start in range(0, whole, BATCH_ROWS):
            yield _batch(rows.take(order.slice(start, BATCH_ROWS)))
        left = rows.take(order.slice(whole))
    if len(left):
        yield _batch(left)


def windows(one: Manifest, other: Manifest) -> Iterator[tuple[slice, slice]]:
    """The rows of two lists, both by key, in neighbouring windows: none has more than a batch of either.

    A key that both lists have is in the same window of both.
    """
    last = {
        manifest[end - 1].id.key
        for manifest in (one, other)
        for end in (*range(BATCH_ROWS, len(manifest), BATCH_ROWS), len(manifest))
        if end
    }
    ends = [(_end(one, key), _end(other, key)) for key in sorted(last)]
    for (a, c), (b, d) in pairwise([(0, 0), *ends]):
        yield slice(a, b), slice(c, d)


def _end(manifest: Manifest, key: str) -> int:
    """How many rows have this key or an earlier one."""
    return bisect_right(range(len(manifest)), key, key=lambda index: manifest[index].id.key)


def _parts(manifest: Manifest, folder: Path) -> Iterator[pa.Table]:
    """The rows with their keys; no key of a part comes before one of an earlier part."""
    cuts = _cuts(manifest)
    if not cuts:
        yield pa.concat_tables([_KEYED.empty_table(), *_keyed(manifest)])
        return
    paths = [folder / f"{number}.part" for number in range(len(cuts) + 1)]
    with ExitStack() as open_files:
        writers = [open_files.enter_context(pa.ipc.new_stream(str(path), _KEYED)) for path in paths]
        for rows in _keyed(manifest):
            ordered = rows.take(pc.sort_indices(rows["key"]))
            ends = [_first_at(ordered["key"], cut) for cut in cuts]
            for writer, (start, end) in zip(writers, pairwise([0, *ends, len(ordered)]), strict=True):
                writer.write_table(ordered.slice(start, end - start))
    for path in paths:
        with pa.OSFile(str(path)) as file:
            yield pa.ipc.open_stream(file).read_all()
        path.unlink()


def _cuts(manifest: Manifest) -> list[bytes]:
    """The first keys of all parts but the first, by a sample: parts are of about equal length."""
    parts = min(MOST_PARTS, -(-len(manifest) // PART_ROWS))
    if parts < 2:
        return []
    chance = random.Random(parts)  # noqa: S311 - any will do
    asked = chance.sample(range(len(manifest)), min(len(manifest), parts * _ASKED))
    keys = sorted(object.id.key.encode() for object in manifest.take(asked))
    return [keys[part * len(keys) // parts] for part in range(1, parts)]


def _keyed(manifest: Manifest) -> Iterator[pa.Table]:
    """The rows with their keys, a batch at a time."""
    rows = manifest.table()
    at = 0
    for keys in manifest.key_parts():
        part = rows.slice(at, len(keys))
        yield pa.table([pa.array(keys, pa.large_binary()), part["id"], part["size"]], schema=_KEYED)
        at += len(keys)


def _first_at(keys: pa.ChunkedArray, key: bytes) -> int:
    """Where the first of sorted `keys` is that isn't before `key`."""

    def key_at(index: int) -> bytes:
        found: bytes = keys[index].as_py()
        return found

    return bisect_left(range(len(keys)), key, key=key_at)


def _check_once(keys: pa.ChunkedArray) -> None:
    """Raises IntegrityError if two of the sorted keys are the same."""
    if (twice := pc.equal(keys[1:], keys[:-1]).index(True).as_py()) >= 0:
        raise IntegrityError(f"a listing has {keys[twice].as_py().decode()!r} twice")


def _batch(rows: pa.Table) -> pa.RecordBatch:
    """Rows that a `take` has just made, as one batch of a list: it begins where its memory does."""
    (batch,) = rows.select(["id", "size"]).combine_chunks().to_batches()
    return batch
