"""A store with every kind of content, and every kind of damage to it: what `torchcache doctor` is tried on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchcache_server.cache.save_records import encode_lease, encode_save, encode_uploaded
from torchcache_server.cache.saves import Save, SaveKey
from torchcache_server.store import Store
from torchcache_server.store.ledger import record_name

from tests.unit.store_parts import CAPACITY, chunk, fill, find_payload, flip_bit, overwrite, payload
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId
from torchcache.records import folder_name

KEY = SaveKey("s3", "run/step-1")
SAVE_ID = "0123abcd"
SHARD = "__0_0.distcp"
SHARD_BYTES = CHUNK_BYTES + 40_000
SIZE = 40_000  # three blocks
DATASET = "s3/data/"
OTHER = "s3/other/"
NAMESPACE = KEY.namespace(SAVE_ID)


def save(state: str = "committed") -> Save:
    return Save(
        key=KEY,
        save_id=SAVE_ID,
        files=((SHARD, SHARD_BYTES),),
        metadata=b"metadata",
        manifest=b"manifest",
        overwrite=False,
        replaceable=(),
        state=state,  # type: ignore[arg-type]
        committed_unix_s=1.5,
    )


def shard_chunk(index: int) -> ChunkId:
    return ChunkId(ObjectId(KEY.store, f"{KEY.path}/{SHARD}", f"save:{SAVE_ID}"), index)


def shard_payload(index: int) -> bytes:
    return payload(1000 + index, shard_chunk(index).length(SHARD_BYTES))


def build(path: Path, *, clean: bool = True) -> None:
    """A pinned dataset, one that isn't, and a checkpoint that lies nowhere else."""
    live = path if clean else path.with_suffix(".live")
    store = Store(live, capacity_bytes=CAPACITY)
    fill(store, DATASET, range(10), SIZE)
    fill(store, OTHER, range(10, 15), SIZE)
    for index in range(2):
        store.put(NAMESPACE, shard_chunk(index), SHARD_BYTES, shard_payload(index))
    store.pin(DATASET, True)
    store.sync(NAMESPACE)
    store.keep(NAMESPACE, True)
    store.put_record(b"save/" + KEY.digest, encode_save(save()))
    store.put_record(b"uploaded/" + KEY.digest, encode_uploaded(SAVE_ID, {}))
    store.put_record(b"lease/" + KEY.digest, encode_lease(KEY, {"dead"}))
    if not clean:
        shutil.copytree(live, path)
    store.close()
    if not clean:
        shutil.rmtree(live)


def checkpoint_is_whole(store: Store) -> bool:
    found = [store.lookup(shard_chunk(index)) for index in range(2)]
    return all(
        one is not None and one.is_intact() and bytes(one.payload) == shard_payload(index)
        for index, one in enumerate(found)
    )


def snapshot(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """All there is in a folder: modes, times of change, contents."""
    return {
        str(found.relative_to(path)): (
            found.lstat().st_mode,
            found.lstat().st_mtime_ns,
            found.read_bytes() if found.is_file() else b"",
        )
        for found in path.rglob("*")
    }


def segment_of(path: Path, namespace: str) -> Path:
    (file,) = (path / "segments" / folder_name(namespace)).glob("*.segment")
    return file


def record_file(path: Path, ledger: str, key: bytes) -> Path:
    return path / ledger / record_name(key)


SAVE_RECORD = b"save/" + KEY.digest


def spoil(file: Path) -> None:
    """Both copies of a record."""
    data = file.read_bytes()
    for at in (20, data.rindex(b"tcLEDGR2") + 20):
        flip_bit(file, at, 2)


# ---- the kinds of damage: each a function of the store's folder ----


def one_copy_of_a_record(path: Path) -> None:
    flip_bit(record_file(path, "records", SAVE_RECORD), 40)


def one_copy_of_a_flag(path: Path) -> None:
    flip_bit(record_file(path, "flags", NAMESPACE.encode()), 5)


def both_copies_of_a_record(path: Path) -> None:
    spoil(record_file(path, "records", SAVE_RECORD))


def both_copies_of_a_flag(path: Path) -> None:
    spoil(record_file(path, "flags", NAMESPACE.encode()))


def both_copies_of_a_pin(path: Path) -> None:
    spoil(record_file(path, "flags", DATASET.encode()))


def all_records(path: Path) -> None:
    shutil.rmtree(path / "records")


def all_flags(path: Path) -> None:
    shutil.rmtree(path / "flags")


def one_identity(path: Path) -> None:
    flip_bit(path / "store.json", 12)


def payload_of_a_dataset(path: Path) -> None:
    file = segment_of(path, OTHER)
    flip_bit(file, find_payload(file, payload(12, SIZE)) + 100)


def end_of_a_payload(path: Path) -> None:
    file = segment_of(path, OTHER)
    overwrite(file, find_payload(file, payload(12, SIZE)) + SIZE - 3000, bytes(3000))


def header_of_a_record(path: Path) -> None:
    file = segment_of(path, OTHER)
    flip_bit(file, find_payload(file, payload(12, SIZE)) - 100)


def header_of_a_segment(path: Path) -> None:
    flip_bit(segment_of(path, OTHER), 20)


def header_of_a_checkpoint(path: Path) -> None:
    flip_bit(segment_of(path, NAMESPACE), 20)


def vanished_segment(path: Path) -> None:
    segment_of(path, OTHER).unlink()


def missing_index(path: Path) -> None:
    shutil.rmtree(path / "index")


def cut_index(path: Path) -> None:
    with (path / "index" / "data.mdb").open("r+b") as file:
        file.truncate(9000)


def flipped_index(path: Path) -> None:
    flip_bit(path / "index" / "data.mdb", 5000)


def loose_modes(path: Path) -> None:
    path.chmod(0o777)
    (path / "store.json").chmod(0o644)
    (path / "segments").chmod(0o755)
    segment_of(path, DATASET).chmod(0o666)


def payload_of_a_checkpoint(path: Path) -> None:
    file = segment_of(path, NAMESPACE)
    flip_bit(file, find_payload(file, shard_payload(1)) + 100)


def chunk_of_a_checkpoint(path: Path) -> None:
    file = segment_of(path, NAMESPACE)
    overwrite(file, find_payload(file, shard_payload(1)) - 128, bytes(40_128))


def both_identities(path: Path) -> None:
    for name in ("store.json", "store-copy.json"):
        flip_bit(path / name, 12)


def symlinked_flag(path: Path) -> None:
    file = record_file(path, "flags", NAMESPACE.encode())
    file.rename(path.parent / "moved")
    file.symlink_to(path.parent / "moved")


@dataclass(frozen=True)
class Damage:
    """`kinds`: what is found. `loses`: the numbers of chunks that are gone afterwards, of DATASET and OTHER."""

    inflict: Callable[[Path], None]
    kinds: set[str]
    loses: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.inflict.__name__


REPAIRABLE = [
    Damage(one_copy_of_a_record, {"record-copy"}),
    Damage(one_copy_of_a_flag, {"record-copy"}),
    Damage(both_copies_of_a_record, {"record"}),
    Damage(both_copies_of_a_flag, {"flag"}),
    Damage(both_copies_of_a_pin, {"flag"}),
    Damage(all_records, {"lost-ledger"}),
    Damage(all_flags, {"lost-ledger"}),
    Damage(one_identity, {"identity"}),
    Damage(payload_of_a_dataset, {"payload"}, (12,)),
    Damage(end_of_a_payload, {"torn"}, (12,)),
    Damage(header_of_a_record, {"index"}, (12,)),
    Damage(header_of_a_segment, {"header", "index"}, tuple(range(10, 15))),
    Damage(header_of_a_checkpoint, {"header"}),
    Damage(vanished_segment, {"index"}, tuple(range(10, 15))),
    Damage(missing_index, {"index"}),
    Damage(cut_index, {"index"}),
    Damage(flipped_index, {"index"}),
    Damage(loose_modes, {"mode"}),
]

BEYOND_REPAIR = [
    Damage(payload_of_a_checkpoint, {"payload", "save"}),
    Damage(chunk_of_a_checkpoint, {"index", "save"}),
    Damage(both_identities, {"lost-identity"}),
    Damage(symlinked_flag, {"odd"}),
]

DATASET_CHUNKS = {number: chunk(number) for number in range(15)}
