"""A client that reads all objects of a dataset once, in an order of its own, and says after each batch that it did.

Arguments: the pool's address, the token's file, a file with the objects as JSON ([store, key, version, size] each), a
seed. Before it reads it waits for a line, so that several begin together.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import closing
from pathlib import Path

from tests.integration.self_describing import difference
from torchcache import connect
from torchcache.model import Extent, ObjectId, ObjectInfo

BATCH = 16


def main(address: str, token_file: str, listing: str, seed: str) -> None:
    objects = [
        ObjectInfo(ObjectId(store, key, version), size)
        for store, key, version, size in json.loads(Path(listing).read_text())
    ]
    random.Random(seed).shuffle(objects)
    with closing(connect(address, token=Path(token_file).read_text().strip(), lane="flight")) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        for first in range(0, len(objects), BATCH):
            batch = objects[first : first + BATCH]
            for info, view in zip(
                batch, pool.read([Extent(info) for info in batch], timeout_s=120), strict=True
            ):
                assert len(view) == info.size
                assert not difference(info.id.key, 0, 0, view), f"{info.id} is wrong"
            print(first + len(batch), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
