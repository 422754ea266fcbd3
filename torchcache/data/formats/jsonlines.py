"""JSON lines: a JSON value a line, in UTF-8. Blank lines are no records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from torchcache.data.formats.base import MAX_RECORD_BYTES, RecordFormat, Stream, damaged, place

_READ_BYTES = 1 << 20


class JsonLines(RecordFormat):
    """What `datasets` calls json, one value a line. A sample is the value, most often a dict."""

    name: ClassVar[str] = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def frames(self, stream: Stream, where: str) -> Iterator[tuple[int, bytes]]:
        at, held = 0, b""
        while True:
            data = stream.read(_READ_BYTES)
            *lines, rest = (held + data).split(b"\n") if data else (held, b"")
            for line in lines:
                if line.strip():
                    yield at, line
                at += len(line) + 1
            if not data:
                return
            held = rest
            if len(held) > MAX_RECORD_BYTES:
                raise damaged(where, f"the line at byte {at} has more than {MAX_RECORD_BYTES:,} bytes")

    def record(self, frame: memoryview, url: str, number: int) -> Any:
        try:
            return json.loads(str(frame, "utf-8-sig" if bytes(frame[:1]) == b"\xef" else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise damaged(place(url, number), f"it is no JSON: {error}") from error
