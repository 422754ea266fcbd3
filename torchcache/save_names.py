"""How what belongs to a save is called: its files, in the pool and in the under-store, and its namespace. Pure."""

from __future__ import annotations

from typing import Final

from torchcache.model import SAVE_PREFIX, ObjectId

METADATA_NAME: Final = ".metadata"
"""Behind a save's part: the file with torch's own Metadata."""

MANIFEST_NAME: Final = ".torchcache.json"
"""Behind a save's part: the file with our manifest."""

MOST_MANIFEST_BYTES: Final = 512 * 1024 * 1024
"""Larger ones aren't read, as a manifest is taken into memory whole: some two million items."""

CLAIM_NAME: Final = ".torchcache.save.json"
"""Behind a save's part: the claim of whoever is saving, or deleting, there."""

PUT_PREFIX: Final = "put:"
"""Namespaces of objects that are put into the pool to be published start so."""

KEPT_PREFIXES: Final = (SAVE_PREFIX, PUT_PREFIX)
"""Namespaces of bytes that exist nowhere else yet start so."""


def saved_file(store: str, path: str, name: str, save_id: str) -> ObjectId:
    """File `name` of a save at `path`, as the pool holds it."""
    return ObjectId(store, f"{path}/{name}", f"{SAVE_PREFIX}{save_id}")


def save_namespace(store: str, path: str, save_id: str) -> str:
    """What a save's files are stored under in the pool."""
    return f"{SAVE_PREFIX}{store}/{path}@{save_id}"


def split_save_namespace(namespace: str) -> tuple[str, str, str] | None:
    """Under-store, path and save id of a `save_namespace`; None of another."""
    where, at, save_id = namespace.removeprefix(SAVE_PREFIX).rpartition("@")
    store, slash, path = where.partition("/")
    return (store, path, save_id) if namespace.startswith(SAVE_PREFIX) and at and slash else None


def put_namespace(written: ObjectId) -> str:
    """What an object to be published is stored under in the pool; its version is `save:<write_id>`."""
    return f"{PUT_PREFIX}{written.store}/{written.key}@{written.version.removeprefix(SAVE_PREFIX)}"
