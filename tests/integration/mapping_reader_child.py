"""A reader of another process: it maps segments, as recycling.py says that one has to, and looks at them again later.

Its job says the store's folder, and whether it takes the locks: without them it is the reader that would be wronged,
and shows that there is something to be kept from. Orders:

    "hold"     map about half of the segments that are there, and note the checksum of every record's payload
    "compare"  the same records again: `changed` are those whose bytes are not as noted
    "release"  let go
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import xxhash

from torchcache.records import SegmentHeader, decode_record, parse_file_name


@dataclass(frozen=True)
class Job:
    """What to read, and how."""

    store: str
    takes_locks: bool


@dataclass
class Held:
    """One mapped segment, and the payloads in it: start, end, checksum."""

    fd: int
    view: memoryview
    payloads: list[tuple[int, int, int]]

    def changed(self) -> int:
        return sum(
            xxhash.xxh3_64_intdigest(self.view[start:end]) != digest for start, end, digest in self.payloads
        )

    def release(self) -> None:
        self.view.release()
        os.close(self.fd)


def hold(path: Path, *, takes_locks: bool) -> Held | None:
    """The segment, mapped; None if it isn't the one its name says any more."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if takes_locks:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # just being made into another
            os.close(fd)
            return None
    view = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    header = SegmentHeader.decode(view[: 1 << 16])
    if header is None or (header.number, header.nonce) != parse_file_name(path.name):
        os.close(fd)
        return None
    payloads = []
    at = header.length
    while record := decode_record(view, header.nonce, at):
        start = at + record.length
        end = start + record.payload_bytes
        # Between the header and the look at the payload the file may have gone: only what is whole is held.
        if xxhash.xxh3_64_intdigest(view[start:end]) == record.digest:
            payloads.append((start, end, record.digest))
        at += record.record_bytes
    return Held(fd, view, payloads)


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    held: list[Held] = []
    for line in sys.stdin:
        answer: dict[str, object] = {}
        match json.loads(line):
            case "hold":
                paths = sorted(Path(job.store, "segments").rglob("*.segment"))
                for path in random.sample(paths, -(-len(paths) // 2)):
                    if one := hold(path, takes_locks=job.takes_locks):
                        held.append(one)
                answer = {"records": sum(len(one.payloads) for one in held)}
            case "compare":
                answer = {"changed": sum(one.changed() for one in held)}
            case "release":
                while held:
                    held.pop().release()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
