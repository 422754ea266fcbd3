"""Saves one checkpoint after another, each to a path of its own, and names each that was acknowledged, until killed.

Arguments: the store's folder, the under-store's URI, what the saves' ids begin with.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from torchcache_server.cache.saves import SaveKey
from torchcache_server.understore import create
from write_back_parts import Server


def main(folder: str, uri: str, prefix: str) -> None:
    server = Server(Path(folder), create("under", uri))
    for number in itertools.count():
        save_id = f"{prefix}-{number}"
        server.save(save_id, SaveKey("under", save_id))
        print(save_id, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
