"""Warm epochs of the same records, side by side: ours, webdataset, litdata and plain files, in one process.

Everybody gives `bytes`, so that everybody has read them: a mapping that nobody touches costs nothing. Ours stands there
a second time as `decode=` gets a record: a view, of which every byte was read too, to be verified. Who isn't installed
(`pip install torchcache[bench]`) is left out.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Ground, ground, records_shape
from benchmarks.rounds import alternate

OURS: Final = "torchcache"
OURS_DECODING: Final = "torchcache, decode="
FILES: Final = "plain files"
WEBDATASET: Final = "webdataset"
LITDATA: Final = "litdata"
FORMS: Final = {OURS: "as bytes", OURS_DECODING: "as decode= gets them"}
"""Of ours; the others have `bytes` to give, whatever reads them."""

GOALS: Final = {WEBDATASET: 5.0, LITDATA: 5.0}
"""Of `bytes` beside `bytes`: a view that is only verified is less work than what the others do."""

_SHUFFLED: Final = 1000
"""Records in webdataset's shuffle buffer."""

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask PyPI

Epoch = Callable[[], int]


def measure(scale: Scale) -> Findings:
    """A round is an epoch, shuffled as each of them shuffles."""
    shape = records_shape(scale)
    with ground(shape) as found:
        paths = sorted(found.source.iterdir())
        epochs: dict[str, Epoch] = {
            OURS: _ours(found),
            OURS_DECODING: _ours_decoding(found),
            FILES: _files(paths),
        }
        if find_spec("webdataset"):
            epochs[WEBDATASET] = _webdataset(found.source.parent / "shard.tar", paths)
        if find_spec("litdata"):
            epochs[LITDATA] = _litdata(found.source.parent / "litdata", paths)
        results = alternate(epochs, rounds=scale.rounds)
    rows = [
        Row(
            what=f"warm epoch of {shape.count:,} records of {shape.size:,} B, {form}",
            unit="us a record",
            ours=us_each(results[ours], shape.count),
            bare=us_each(results[name], shape.count),
            against=name,
            goal=Goal(bound=GOALS[name]) if name in GOALS and ours == OURS else None,
        )
        for ours, form in FORMS.items()
        for name in (FILES, WEBDATASET, LITDATA)
        if name in results
    ]
    return Findings(
        title="Warm epochs beside other loaders",
        rows=rows,
        contenders={"warm epochs": list(results.values())},
    )


def _size(records: Iterable[bytes]) -> int:
    return sum(len(record) for record in records)


def _ours(found: Ground) -> Epoch:
    dataset = tc.CachedDataset.from_files(found.source, pool=found.warm.pool)
    batches = found.shape.batches()
    return lambda: sum(_size(dataset.__getitems__(batch)) for batch in batches)


def _ours_decoding(found: Ground) -> Epoch:
    dataset = tc.CachedDataset.from_files(found.source, decode=len, pool=found.warm.pool)
    batches = found.shape.batches()
    return lambda: sum(sum(dataset.__getitems__(batch)) for batch in batches)


def _files(paths: list[Path]) -> Epoch:
    order = random.Random(1).sample(paths, len(paths))
    return lambda: _size(path.read_bytes() for path in order)


def _webdataset(shard: Path, paths: list[Path]) -> Epoch:
    import webdataset

    with webdataset.TarWriter(str(shard)) as writer:
        for path in paths:
            writer.write({"__key__": path.name, "bin": path.read_bytes()})

    def epoch() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it leaves its files to the collector
            dataset: Any = webdataset.WebDataset(str(shard), shardshuffle=False).shuffle(_SHUFFLED)
            return _size(sample["bin"] for sample in dataset)

    return epoch


def _litdata(folder: Path, paths: list[Path]) -> Epoch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for number, path in enumerate(paths):
            writer.add_item(number, path.read_bytes())
        writer.done()
        writer.merge(1)
        dataset: Any = StreamingDataset(str(folder), shuffle=True)

    return lambda: _size(bytes(record) for record in dataset)
