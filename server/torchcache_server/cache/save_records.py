"""What is noted of saves, as records of the store. Pure.

A committed save is a length, a header in JSON, the metadata, the manifest; the others are JSON alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from typing import Any

from torchcache import errors
from torchcache.errors import TorchCacheError
from torchcache_server.cache.saves import Copy, Deletion, Save, SaveKey

_FORMAT = 1
_WITH_BORROWED = 2  # a version that can't read it must not take what is borrowed for nobody's

SAVE = b"save/"
LEASE = b"lease/"
UPLOADED = b"uploaded/"
DELETION = b"deletion/"
COPY = b"copy/"
"""What the keys of the five kinds of records start with; `SaveKey.digest` follows, and of a copy the save's id."""


def encode_save(save: Save) -> bytes:
    """The record of `save`, for `decode_save`."""
    header: dict[str, Any] = {
        "format": _WITH_BORROWED if save.borrowed else _FORMAT,
        "key": [save.key.store, save.key.path, save.key.part],
        "save_id": save.save_id,
        "files": save.files,
        "metadata_bytes": len(save.metadata),
        "manifest_bytes": len(save.manifest),
        "overwrite": save.overwrite,
        "replaceable": save.replaceable,
        "state": save.state,
        "committed_unix_s": save.committed_unix_s,
        "writer": save.writer,
        "durable_unix_s": save.durable_unix_s,
        "manifest_version": save.manifest_version,
        "claimed": save.claimed,
        "error": _error_fields(save.error),
        "replicas": save.replicas,
        "unbroken": save.unbroken,
    }
    if save.borrowed:
        header["borrowed"] = {name: list(origin) for name, origin in save.borrowed.items()}
    encoded = json.dumps(header).encode()
    return struct.pack("<I", len(encoded)) + encoded + save.metadata + save.manifest


def decode_save(record: bytes) -> Save:
    """Raises ValueError if `record` isn't one that this version wrote."""
    try:
        (header_bytes,) = struct.unpack_from("<I", record)
        fields = json.loads(record[4 : 4 + header_bytes])
        if fields["format"] not in (_FORMAT, _WITH_BORROWED):
            raise ValueError(f"record of format {fields['format']}")
        middle = 4 + header_bytes + fields["metadata_bytes"]
        end = middle + fields["manifest_bytes"]
        if end != len(record):
            raise ValueError(f"record of {len(record)} bytes where {end} are due")
        if fields["state"] not in ("committed", "durable", "failed"):
            raise ValueError(f"record of a save in state {fields['state']!r}")
        return Save(
            key=_key_of(fields["key"]),
            save_id=fields["save_id"],
            files=tuple((name, size) for name, size in fields["files"]),
            metadata=record[4 + header_bytes : middle],
            manifest=record[middle:end],
            overwrite=fields["overwrite"],
            replaceable=tuple(fields["replaceable"]),
            state=fields["state"],
            committed_unix_s=fields["committed_unix_s"],
            writer=fields["writer"],
            durable_unix_s=fields["durable_unix_s"],
            manifest_version=fields["manifest_version"],
            claimed=fields["claimed"],
            error=_error_of(fields["error"]),
            replicas=int(fields.get("replicas", 1)),
            unbroken=bool(fields.get("unbroken", False)),
            borrowed=_borrowed_of(fields["borrowed"]) if fields["format"] == _WITH_BORROWED else {},
        )
    except (struct.error, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a save's record: {error!r}") from error


def copy_key(save: Save) -> bytes:
    """The key of the record of a copy of `save`: a path may have several."""
    return COPY + save.key.digest + save.save_id.encode()


def encode_copy(copy: Copy) -> bytes:
    """The record of a copy, for `decode_copy`: a length, JSON, and the save's own record."""
    encoded = json.dumps({"owner": copy.owner, "confirmed": copy.confirmed}).encode()
    return struct.pack("<I", len(encoded)) + encoded + encode_save(copy.save)


def decode_copy(record: bytes) -> Copy:
    """Raises ValueError if `record` isn't one that this version wrote."""
    try:
        (header_bytes,) = struct.unpack_from("<I", record)
        fields = json.loads(record[4 : 4 + header_bytes])
        (owner,) = _texts([fields["owner"]])
        return Copy(decode_save(record[4 + header_bytes :]), owner, bool(fields["confirmed"]))
    except (struct.error, KeyError, TypeError) as error:
        raise ValueError(f"not a copy's record: {error!r}") from error


def encode_lease(key: SaveKey, save_ids: Collection[str]) -> bytes:
    """The record that claims of `save_ids` may lie in the under-store, for `decode_lease`."""
    fields = {"key": [key.store, key.path, key.part], "save_ids": sorted(save_ids)}
    return json.dumps(fields).encode()


def decode_lease(record: bytes) -> tuple[SaveKey, set[str]]:
    """Raises ValueError if `record` isn't one that this version wrote."""
    try:
        fields = json.loads(record)
        return _key_of(fields["key"]), set(_texts(fields["save_ids"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a lease's record: {error!r}") from error


def encode_uploaded(save_id: str, versions: Mapping[str, str]) -> bytes:
    """The record of what shards of a save lie in the under-store, and as what version, for `decode_uploaded`."""
    return json.dumps({"save_id": save_id, "uploaded": dict(versions)}).encode()


def decode_uploaded(record: bytes) -> tuple[str, dict[str, str]]:
    """Raises ValueError if `record` isn't one that this version wrote."""
    try:
        fields = json.loads(record)
        names = _texts(fields["uploaded"])
        return fields["save_id"], dict(zip(names, _texts(fields["uploaded"].values()), strict=True))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a record of an upload: {error!r}") from error


def encode_deletion(deletion: Deletion) -> bytes:
    """The record of a save that is being deleted, for `decode_deletion`."""
    key = deletion.key
    fields = {
        "key": [key.store, key.path, key.part],
        "save_id": deletion.save_id,
        "files": deletion.files,
        "manifests": deletion.manifests,
    }
    return json.dumps(fields).encode()


def decode_deletion(record: bytes) -> Deletion:
    """Raises ValueError if `record` isn't one that this version wrote."""
    try:
        fields = json.loads(record)
        (save_id,) = _texts([fields["save_id"]])
        files, manifests = _texts(fields["files"]), _texts(fields["manifests"])
        return Deletion(_key_of(fields["key"]), save_id, tuple(files), tuple(manifests))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a deletion's record: {error!r}") from error


def _key_of(fields: Any) -> SaveKey:
    store, path, part = _texts(fields)
    return SaveKey(store, path, part)


def _borrowed_of(fields: Any) -> dict[str, tuple[str, str]]:
    borrowed = {}
    for name, origin in fields.items():
        path, save_id = _texts(origin)
        borrowed[name] = (path, save_id)
    return borrowed


def _texts(values: Any) -> list[str]:
    texts = list(values)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("texts are expected")
    return texts


def _error_fields(error: TorchCacheError | None) -> list[str | None] | None:
    return None if error is None else [type(error).__name__, error.message, error.object, error.server]


def _error_of(fields: list[str | None] | None) -> TorchCacheError | None:
    if fields is None:
        return None
    name, message, object, server = fields
    kind = getattr(errors, name or "", TorchCacheError)
    if not (isinstance(kind, type) and issubclass(kind, TorchCacheError)):
        kind = TorchCacheError
    return kind(message or "", object=object, server=server)
