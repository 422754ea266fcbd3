"""Records on one machine: CachedDataset beside preadv of the same bytes into buffers that are used again."""

from __future__ import annotations

from typing import Final

from benchmarks.bare_files import FlatFile, buffers
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import all_of, check, ground, reader, records_shape
from benchmarks.rounds import alternate
from torchcache.data.outputs import Output

FORMS: Final[dict[str, tuple[Output, float]]] = {
    "into buffers": ("numpy", 1.2),
    "as bytes": ("bytes", 1.4),
    "as views": ("view", 2.0),
}
"""What a record can be, the output that it is, and how many times faster than preadv it is to be."""


def measure(scale: Scale) -> Findings:
    """All forms beside preadv, in turn, batch after batch of one request each."""
    shape = records_shape(scale)
    batches = shape.batches()
    with ground(shape, lane="local") as found, FlatFile(found.flat, shape.size) as file:
        into = buffers(shape.batch, shape.size)
        contenders = {}
        for form, (output, _) in FORMS.items():
            read = reader(found, output)
            check(found, read)
            contenders[f"torchcache, {form}"] = all_of(shape, read)
        contenders["preadv"] = lambda: sum(file.read(batch, into) for batch in batches)
        results = alternate(contenders, rounds=scale.rounds)
    rows = [
        Row(
            what=f"batches of {shape.name}, {form}",
            unit="us a record",
            ours=us_each(results[f"torchcache, {form}"], shape.count),
            bare=us_each(results["preadv"], shape.count),
            against="preadv into reused buffers",
            goal=Goal(bound=bound),
        )
        for form, (_, bound) in FORMS.items()
    ]
    return Findings(
        title="Records on one machine",
        rows=rows,
        contenders={f"batches of {shape.name}": list(results.values())},
    )
