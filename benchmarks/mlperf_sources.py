"""Where a simulated accelerator's readers get their bytes: the pool, plain files, or S3 itself.

A source pickles, and opens what it needs at its first read in each process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torchcache as tc
from benchmarks.mlperf_shapes import Sample


class Source(Protocol):
    """One of the contenders. `own_memory`: it needs no buffers to read into."""

    own_memory: ClassVar[bool]

    def read(self, samples: Sequence[Sample], into: Sequence[memoryview]) -> object:
        """Fills one buffer a sample, each of its length, or gives samples that lie in memory of its own.

        What it gives is kept until the batch has been computed on. Called from several threads.
        """


@dataclass
class CachedSource:
    """`CachedDataset.__getitems__`, verified: a file a sample, or records of a file, in its own reused buffers."""

    dataset: tc.CachedDataset
    samples_a_file: int
    own_memory: ClassVar[bool] = True

    def read(self, samples: Sequence[Sample], into: Sequence[memoryview]) -> object:
        each = self.samples_a_file
        return self.dataset.__getitems__([file * each + offset // length for file, offset, length in samples])


@dataclass
class FileSource:
    """preadv of files that stay open: the least that reading a file costs."""

    paths: list[Path]
    own_memory: ClassVar[bool] = False
    _open: dict[int, int] = field(default_factory=dict)

    def read(self, samples: Sequence[Sample], into: Sequence[memoryview]) -> None:
        for (file, offset, length), buffer in zip(samples, into, strict=True):
            if file not in self._open:
                self._open[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < length:
                done += os.preadv(self._open[file], [buffer[done:]], offset + done)


@dataclass
class S3Source:
    """boto3, as a dataset over a bucket would use it: a GET for each run of samples that follow one another."""

    client_settings: dict[str, str]
    bucket: str
    keys: list[str]
    own_memory: ClassVar[bool] = False
    _client: Any = None

    def read(self, samples: Sequence[Sample], into: Sequence[memoryview]) -> None:
        if self._client is None:
            import boto3

            self._client = boto3.client("s3", **self.client_settings)
        for first, last in runs(samples):
            start, end = samples[first].offset, samples[last].offset + samples[last].length
            key = self.keys[samples[first].file]
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            body = memoryview(answer["Body"].read())
            at = 0
            for number in range(first, last + 1):
                length = samples[number].length
                into[number][:] = body[at : at + length]
                at += length


def runs(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """The first and last place of each run of samples that follow one another in a file."""
    first = 0
    for place in range(1, len(samples) + 1):
        if place < len(samples):
            before, here = samples[place - 1], samples[place]
            if before.file == here.file and before.offset + before.length == here.offset:
                continue
        yield first, place - 1
        first = place
