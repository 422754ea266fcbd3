"""`endpoint.json` of an embedded server: where it listens, for the processes that share it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torchcache.plain_files import read_plain

NAME = "endpoint.json"


class EndpointFile:
    """The file in a server's folder. Written whole or not at all, readable by its owner only."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self._path = folder / NAME
        self._fields = fields

    def write(self, **changed: Any) -> None:
        """Writes the fields, those `changed` from now on different."""
        self._fields |= changed
        temporary = self._path.with_name(f".{NAME}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._fields, file, indent=2)
        temporary.replace(self._path)

    def remove(self) -> None:
        """Removes the file, unless another server has written its own since."""
        try:
            if json.loads(read_plain(self._path)).get("instance") == self._fields["instance"]:
                self._path.unlink()
        except (OSError, ValueError):
            pass
