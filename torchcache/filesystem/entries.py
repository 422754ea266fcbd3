"""fsspec's entries, and folders seen in a flat listing. Pure.

An under-store has keys, not folders: a folder is there if a key lies under it. Paths have no protocol and no slash at
the end; the first segment is the under-store's name. "" is the root, whose children are the under-stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchcache.model import ObjectInfo

Entry = dict[str, Any]
"""What fsspec calls info: `name` (path), `size` in bytes, `type` "file" or "directory", and a file's `version`."""


def file_entry(path: str, object: ObjectInfo) -> Entry:
    return {"name": path, "size": object.size, "type": "file", "version": object.id.version}


def folder_entry(path: str) -> Entry:
    return {"name": path, "size": 0, "type": "directory"}


def entries_under(
    folder: str, files: Iterable[Entry], *, maxdepth: int | None = None
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """(files, folders) by path, from all `files` below `folder`.

    `maxdepth` counts the levels below `folder`: 1 is its children alone. A key that ends in a slash, which some
    programs store to mark an empty folder, is that folder and not a file.
    """
    depth = len(folder) + 1 if folder else 0
    kept: dict[str, Entry] = {}
    folders: dict[str, Entry] = {}
    for entry in files:
        *parents, last = entry["name"][depth:].split("/")
        path = folder
        for name in parents[:maxdepth]:
            path = f"{path}/{name}" if path else name
            if path not in folders and path != folder:
                folders[path] = folder_entry(path)
        if last and (maxdepth is None or len(parents) < maxdepth):
            kept[entry["name"]] = entry
    return kept, folders
