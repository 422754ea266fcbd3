"""From what a user names, URIs, patterns or lists of them, to the shards they mean."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from torchcache.data.files import checked_uri
from torchcache.data.formats import is_shard
from torchcache.data.progress import listing_progress
from torchcache.errors import ConfigurationError, ObjectNotFound
from torchcache.model import ObjectInfo
from torchcache.pool import Pool
from torchcache.pool.storage_uris import at_storage

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

MOST_NAMES: Final = 1_000_000
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_WILD: Final = re.compile(r"[*?\[]")
_LIST_FROM: Final = 8
"""As many names in one folder are found by listing it; fewer are asked for one by one."""


def find_shards(pool: Pool, source: Source) -> list[ObjectInfo]:
    """The shards of `source`: as they are named, those of a folder or a pattern by key. All of one under-store.

    Raises ConfigurationError for what is no source, and ObjectNotFound naming what isn't there.
    """
    shards: list[ObjectInfo] = []
    named: list[str] = []
    for uri in _uris(pool, source):
        if _WILD.search(uri):
            shards += _asked(pool, named)
            named = []
            shards += _matching(pool, uri)
        else:
            named.append(uri)
    shards += _asked(pool, named)
    stores = sorted({shard.id.store for shard in shards})
    if len(stores) > 1:
        raise ConfigurationError(
            f"the shards of a dataset lie in one under-store, not in {' and '.join(stores)}"
        )
    return shards


def _uris(pool: Pool, source: Source) -> Iterator[str]:
    """URIs without braces, as the storage's own."""
    given = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise ConfigurationError(
            f"a source is a URI, a pattern, a list of them or an IterableDataset, not {type(source).__name__}"
        )
    empty = True
    for item in given:
        for expanded in expand(os.fspath(item) if isinstance(item, os.PathLike) else item):
            empty = False
            yield at_storage(pool, checked_uri(expanded)) + ("/" if str(expanded).endswith("/") else "")
    if empty:
        raise ConfigurationError("a dataset needs at least one shard: the list is empty")


def expand(text: str) -> list[str]:
    """Braces, as a shell expands them: `{000..127}`, `{0..8..2}`, `{train,val}`; several multiply.

    Raises ConfigurationError for more than a million names.
    """
    match = _BRACES.search(text) if isinstance(text, str) else None
    if match is None:
        return [text]
    front, rest = text[: match.start()], expand(text[match.end() :])
    middle = _alternatives(match[1])
    if len(middle) * len(rest) > MOST_NAMES:
        raise ConfigurationError(f"{text!r} names more than {MOST_NAMES:,} shards")
    return [front + part + tail for part in middle for tail in rest]


def _alternatives(inside: str) -> list[str]:
    match = _RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    padded = match[1].startswith("0") or match[2].startswith("0")
    width = max(len(match[1]), len(match[2])) if padded else 0
    if not step or abs(last - first) // step >= MOST_NAMES:
        raise ConfigurationError(f"{{{inside}}} names more than {MOST_NAMES:,} shards")
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _matching(pool: Pool, pattern: str) -> list[ObjectInfo]:
    """The objects that a pattern matches: `*` and `?` within a folder, `**` across."""
    folder = pattern[: _WILD.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    prefix = pool.resolve(folder + "/")[1]
    matches = re.compile(translated(pattern[len(folder) + 1 :])).fullmatch
    found = [
        o for o in _listed(pool, folder) if matches(o.id.key.removeprefix(prefix)) and o.id.key[-1] != "/"
    ]
    if not found:
        raise ObjectNotFound(f"no object under {folder}/ matches {pattern}", object=pattern)
    return sorted(found, key=lambda object: object.id.key)


def translated(pattern: str) -> str:
    """A regular expression for a pattern in which `*` stops at slashes and `**` doesn't."""
    parts = []
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|.", pattern, re.DOTALL):
        if part == "**/":
            parts.append("(?:.*/)?")
        elif part in ("**", "*", "?"):
            parts.append({"**": ".*", "*": "[^/]*", "?": "[^/]"}[part])
        elif part.startswith("[") and len(part) > 2:
            inside = part[1:-1].replace("\\", "\\\\").replace("[", r"\[")
            parts.append(f"[{'^' + inside[1:] if inside.startswith('!') else inside}]")
        else:
            parts.append(re.escape(part))
    return "(?s:" + "".join(parts) + ")"


def _asked(pool: Pool, uris: Sequence[str]) -> list[ObjectInfo]:
    """The objects at `uris`, in order; of one that is a folder, the shards in it."""
    folders: dict[str, int] = {}
    for uri in uris:
        folder = uri.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    listed: dict[str, ObjectInfo] = {}
    for folder, count in folders.items():
        if count >= _LIST_FROM:
            listed |= {pool.uri(o.id): o for o in _listed(pool, folder)}
    found: list[ObjectInfo] = []
    for uri in uris:
        known = listed.get(uri)
        found += [known] if known is not None else _one(pool, uri)
    return found


def _one(pool: Pool, uri: str) -> list[ObjectInfo]:
    if not uri.endswith("/"):
        try:
            return [pool.stat(uri)]
        except ObjectNotFound:
            pass
    shards = sorted((o for o in _listed(pool, uri) if is_shard(o.id.key)), key=lambda object: object.id.key)
    if not shards:
        raise ObjectNotFound(
            f"there is no shard {uri}, nor a folder of that name with shards in it", object=uri
        )
    return shards


def _listed(pool: Pool, folder: str) -> Iterator[ObjectInfo]:
    """All objects under a folder, in no order. Says how far it is where that takes long."""
    with listing_progress(folder) as advance:
        for count, info in enumerate(pool.list_in_any_order(folder), 1):
            if not count % 1000:
                advance(count)
            yield info


def common_folder(uris: Sequence[str]) -> str:
    """The URI of the folder that holds all of `uris`, without a slash: the dataset's namespace in the pool."""
    first, last = (uri.split("/")[:-1] for uri in (min(uris), max(uris)))
    common = [
        a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ]
    return "/".join(common if len(common) > 2 else first)
