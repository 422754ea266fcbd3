"""What a save is, where its parts lie, and how it is written down. Values only, no I/O.

A *save* is one attempt to commit a checkpoint at a path. In the under-store a path holds, beside the shards:

- `<part>.metadata`: the stock DCP metadata, written behind the shards;
- `<part>.torchcache.json`: our manifest, written last: the commit point of the under-store;
- `<part>.torchcache.save.json`: the claim (claims.py), there only while a save is under way.

An *empty* manifest or metadata object means "none": that is how an overwrite withdraws the old checkpoint. Unlike a
delete, the write of an empty object can be conditional, so a server that was asleep can't withdraw its successor's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torchcache import errors
from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.model import ObjectInfo
from torchcache.save_names import CLAIM_NAME, MANIFEST_NAME, METADATA_NAME, save_namespace, saved_file

_PART = re.compile(r"(__[0-9]{1,9})?")

SaveState = Literal["reserved", "committed", "durable", "failed"]


@dataclass(frozen=True, slots=True, order=True)
class SaveKey:
    """Where a save goes: key prefix `path` (no slash at its end) of under-store `store`.

    `part` is empty, or "__<rank>" when ranks save without collectives and each commits for itself.
    """

    store: str
    path: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.store}/{self.path}" + (f" ({self.part})" if self.part else "")

    @property
    def manifest_key(self) -> str:
        return f"{self.path}/{self.part}{MANIFEST_NAME}"

    @property
    def metadata_key(self) -> str:
        return f"{self.path}/{self.part}{METADATA_NAME}"

    @property
    def claim_key(self) -> str:
        return f"{self.path}/{self.part}{CLAIM_NAME}"

    @property
    def run(self) -> tuple[str, str, str]:
        """Under-store, folder and part: what it shares with the checkpoints of other steps of its run."""
        return self.store, self.path.rpartition("/")[0], self.part

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the key where keys must be short."""
        return hashlib.sha256(json.dumps([self.store, self.path, self.part]).encode()).digest()

    def namespace(self, save_id: str) -> str:
        """The namespace of the store in which the shards of a save lie."""
        return save_namespace(self.store, self.path, save_id)

    def validate(self) -> None:
        """Raises ConfigurationError unless the key can name a checkpoint."""
        steps = self.path.split("/")
        if not self.path or any(step in ("", ".", "..") for step in steps) or "\0" in self.path:
            raise ConfigurationError(
                f"{self.path!r} can't be a checkpoint's path: it needs at least one name, and no empty, '.' or '..' one"
            )
        if not _PART.fullmatch(self.part):
            raise ConfigurationError(
                f"{self.part[:80]!r} can't be a checkpoint's part: '__<rank>' is expected"
            )

    @classmethod
    def of_manifest(cls, store: str, key: str) -> SaveKey | None:
        """The save whose manifest lies at `key`; None if `key` is no manifest's."""
        path, slash, name = key.rpartition("/")
        if not slash or not name.endswith(MANIFEST_NAME):
            return None
        part = name.removesuffix(MANIFEST_NAME)
        return cls(store, path, part) if not part or part.startswith("__") else None


@dataclass(frozen=True, slots=True)
class Save:
    """A save that was committed to the pool, and how far it has come since."""

    key: SaveKey
    save_id: str
    files: tuple[tuple[str, int], ...]  # shards: name relative to the path, bytes
    metadata: bytes = field(repr=False)
    manifest: bytes = field(repr=False)
    overwrite: bool
    replaceable: tuple[
        str, ...
    ]  # manifest_digest of each manifest that this save may overwrite; mark_of each save
    state: Literal["committed", "durable", "failed"]
    committed_unix_s: float
    writer: str = ""  # host and process, for people
    durable_unix_s: float = 0.0
    manifest_version: str = ""  # in the under-store, once durable
    claimed: bool = True  # the claim in the under-store may still be there
    error: TorchCacheError | None = None
    replicas: int = 1  # servers that held it when it was committed, the owner included
    # Files that lie here as those of other saves, which stored them: by name, path and id of that save.
    borrowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    unbroken: bool = False  # since the commit the claim has been nobody's who may have published another save

    @property
    def namespace(self) -> str:
        return self.key.namespace(self.save_id)

    @property
    def namespaces(self) -> frozenset[str]:
        """Where its shards lie: its own namespace, and those of the saves it has borrowed from."""
        return self.namespaces_of(self.borrowed) | {self.namespace}

    def namespaces_of(self, names: Iterable[str]) -> frozenset[str]:
        """Where these of its shards lie."""
        origins = {self.origin(name) for name in names}
        return frozenset(save_namespace(self.key.store, *origin) for origin in origins)

    def origin(self, name: str) -> tuple[str, str]:
        """Path and id of the save that stored the shard `name`."""
        return self.borrowed.get(name, (self.key.path, self.save_id))

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def objects(self) -> dict[str, ObjectInfo]:
        """The shards as the pool holds them, by name."""
        objects = {}
        for name, size in self.files:
            path, save_id = self.origin(name)
            objects[name] = ObjectInfo(saved_file(self.key.store, path, name, save_id), size)
        return objects

    def came_after(self, save_id: str) -> bool:
        """Whether that save is known to have been committed when this one was reserved, to overwrite it."""
        return mark_of(save_id) in self.replaceable

    @property
    def must_be_kept(self) -> bool:
        """Whether the pool holds the only copy that somebody may still want."""
        return self.state != "durable" and not self.is_superseded

    @property
    def is_superseded(self) -> bool:
        return self.state == "failed" and isinstance(self.error, errors.AlreadyExists)

    @property
    def may_mend(self) -> bool:
        """Whether a failed upload is worth another try: somebody may change a setting, or a server with a good copy may
        bring the save to its end."""
        if self.state != "failed" or isinstance(self.error, errors.CheckpointError):
            return False
        return self.replicas > 1 or not isinstance(self.error, errors.IntegrityError)

    @property
    def wants_upload(self) -> bool:
        return self.state == "committed" or self.may_mend

    @property
    def is_under_way(self) -> bool:
        """Whether the upload will go on by itself, up to the release of the claim."""
        return self.state == "committed" or (self.state == "durable" and self.claimed)

    def durable(self, manifest_version: str, now_unix_s: float) -> Save:
        """The metadata isn't needed any more: it is in the under-store."""
        return replace(
            self,
            state="durable",
            metadata=b"",
            manifest_version=manifest_version,
            durable_unix_s=now_unix_s,
            error=None,
        )

    def failed(self, error: TorchCacheError) -> Save:
        return replace(self, state="failed", error=error)


@dataclass(frozen=True, slots=True)
class Copy:
    """A save of another server, `owner` (its id), of which this one holds a copy, whole and synced, until it is
    durable.

    `confirmed`: the owner has committed it. Of one that isn't, only the claim can tell.
    """

    save: Save
    owner: str
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Deletion:
    """A save that is being deleted. `manifests`: the manifest_digest of each that may be withdrawn for it, its own and
    those it was to overwrite."""

    key: SaveKey
    save_id: str
    files: tuple[str, ...]
    manifests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """What a reader or a waiting writer gets to know of a save. Times are 0.0 where they aren't known."""

    key: SaveKey
    save_id: str
    state: SaveState
    manifest: bytes = field(repr=False)
    pending_bytes: int
    total_bytes: int
    error: TorchCacheError | None
    committed_unix_s: float
    durable_unix_s: float
    replicas: int = 1
    later_save_id: str = ""  # of a later save of the path that is committed at another server
    uncertain: bool = False  # one may be, of which the under-store doesn't tell
    borrowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # as of a Save

    @property
    def superseded(self) -> bool:
        """Whether another server has committed a later save of the path."""
        return bool(self.later_save_id)


def check_files(key: SaveKey, files: Sequence[tuple[str, int]], metadata: bytes, manifest: bytes) -> None:
    """Raises ConfigurationError unless these can be the parts of a save."""
    names = [name for name, _ in files]
    for name, size in files:
        if name in ("", ".", "..") or "/" in name or "\0" in name or size < 0:
            raise ConfigurationError(f"{key} can't have a file {name[:80]!r} of {size} bytes")
        if name.endswith((MANIFEST_NAME, METADATA_NAME, CLAIM_NAME)):
            raise ConfigurationError(f"{key} can't have a file {name!r}: the name is reserved")
    if len(set(names)) != len(names):
        raise ConfigurationError(f"{key} names a file twice")
    if not metadata or not manifest:
        raise ConfigurationError(f"{key} can't be committed without metadata and a manifest")


def manifest_digest(manifest: bytes) -> str:
    """Tells manifests apart wherever they are stored; equal only for equal bytes."""
    return hashlib.sha256(manifest).hexdigest()


_MARK = "save:"


def mark_of(save_id: str) -> str:
    """Stands for a save among the digests of what may be overwritten, wherever its manifest isn't known."""
    return _MARK + save_id


def is_mark(digest: str) -> bool:
    return digest.startswith(_MARK)


ManifestKind = Literal["absent", "ours", "replaceable", "other"]
"""What a manifest at a save's path is to the save. `replaceable`: it is older, and the save may overwrite it."""


def kind_of_manifest(save: Save, manifest: bytes | None) -> ManifestKind:
    """None or empty: there is none, or not any more."""
    if not manifest:
        return "absent"
    if manifest == save.manifest:
        return "ours"
    if manifest_digest(manifest) in save.replaceable:
        return "replaceable"
    return "replaceable" if save.came_after(status_of_manifest(save.key, manifest).save_id) else "other"


def status_of_manifest(key: SaveKey, manifest: bytes) -> SaveStatus:
    """The status of a checkpoint of which only the manifest in the under-store is known.

    Id, files and time are read from its body, if they are there: the rest is the reader's to judge.
    """
    save_id, total_bytes, created_unix_s = "", 0, 0.0
    try:
        body = json.loads(manifest)["body"]
        save_id = str(body["save_id"])
        total_bytes = sum(int(size) for _, size in body["files"])
        created_unix_s = float(body["created_unix_s"])
    except (ValueError, TypeError, KeyError):
        pass
    return SaveStatus(key, save_id, "durable", manifest, 0, total_bytes, None, created_unix_s, created_unix_s)
