"""A server's write-back over a real store, the saves that tests make with it, and what must then lie at the path."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.store import Store
from torchcache_server.understore import UnderStore

from torchcache.model import CHUNK_BYTES, ByteRange, ChunkId, ObjectId, ObjectInfo

KEY = SaveKey("under", "run/step-1")
FILES = {"__0_0.distcp": 2 * CHUNK_BYTES + 12345, "__1_0.distcp": 1, "__1_1.distcp": 0}


def soon() -> float:
    return time.monotonic() + 60


def shard(save_id: str, size: int) -> bytes:
    word = f"<{save_id}>".encode()
    return (word * (size // len(word) + 1))[:size]


class Server:
    """The server's write-back on a store of its own, and the little of a client that the saves need."""

    def __init__(
        self,
        folder: Path,
        under_store: UnderStore,
        *,
        lease_s: float = 0.5,
        max_pending_bytes: int | None = None,
    ) -> None:
        self.store = Store(folder, capacity_bytes=256 * 1024 * 1024)
        self.under_store = under_store
        self.write_back = WriteBack(
            self.store,
            {"under": under_store},
            upload_threads=2,
            lease_s=lease_s,
            retry_s=0.05,
            max_pending_bytes=max_pending_bytes,
        )

    def close(self) -> None:
        self.write_back.close()
        self.store.close()

    def save(self, save_id: str, key: SaveKey = KEY, *, overwrite: bool = False) -> None:
        self.write_back.reserve(key, save_id, writer=save_id, overwrite=overwrite, deadline=soon())
        self.put(save_id, key)
        self.commit(save_id, key)

    def put(self, save_id: str, key: SaveKey = KEY) -> None:
        namespace = key.namespace(save_id)
        self.store.keep(namespace, True)
        for name, size in FILES.items():
            object = ObjectInfo(ObjectId("under", f"{key.path}/{name}", f"save:{save_id}"), size)
            data = shard(save_id, size)
            chunks = [ChunkId(object.id, index) for index in range(object.chunk_count)]
            self.store.put_many(
                namespace,
                [(chunk, size, data[chunk.offset : chunk.offset + CHUNK_BYTES]) for chunk in chunks],
            )

    def commit(self, save_id: str, key: SaveKey = KEY) -> None:
        body = {"save_id": save_id, "files": list(FILES.items()), "created_unix_s": time.time()}
        self.write_back.commit(
            key,
            save_id,
            list(FILES.items()),
            f"metadata of {save_id}".encode(),
            json.dumps({"body": body}).encode(),
            deadline=soon(),
        )

    def state(self, key: SaveKey = KEY) -> str:
        status = self.write_back.get(key, deadline=soon())
        return f"{status.state} {status.save_id}"


def lies_there(under_store: UnderStore, key: SaveKey = KEY) -> dict[str, bytes]:
    """Everything under the path, by name."""
    page = under_store.list(f"{key.path}/", start_after="", limit=1000, deadline=soon())
    return {
        info.id.key.removeprefix(f"{key.path}/"): bytes(
            under_store.read(info, ByteRange(0, info.size), deadline=soon())
        )
        for info in page.objects
    }


def assert_published(under_store: UnderStore, save_id: str, key: SaveKey = KEY) -> None:
    """Exactly this save lies at the path, whole, and nothing else."""
    there = lies_there(under_store, key)
    manifest = there.pop(".torchcache.json")
    assert json.loads(manifest)["body"]["save_id"] == save_id
    assert there.pop(".metadata") == f"metadata of {save_id}".encode()
    shards = {name: shard(save_id, size) for name, size in FILES.items()}
    extra = {name: there[name][:300] for name in there.keys() - shards.keys()}
    assert there.keys() == shards.keys(), (
        f"{sorted(there)} lie there, not {sorted(shards)}; too many: {extra}"
    )
    for name, data in shards.items():
        assert there[name] == data, f"{name} has other bytes than {save_id} wrote: {there[name][:40]!r}..."
