"""Where a checkpoint lies: what users write, as one URI without a slash at the end."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torchcache.errors import ConfigurationError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")


def checkpoint_uri(path: str | os.PathLike[str]) -> str:
    """The URI of a checkpoint's folder, from a URI or a path in the file system (made absolute).

    Also of `torchcache://<under-store>/<key>`, which `at_storage` makes one of the storage's own.
    Raises ConfigurationError for what can't name a folder: an empty path, a bare scheme, ".." or empty segments.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigurationError(
            f"{path!r} is no path of a checkpoint; pass a URI such as 's3://bucket/run/step-1' or a folder's path"
        )
    if collapsed := _COLLAPSED.match(text):
        raise ConfigurationError(
            f"{text!r} looks like a URI that went through pathlib, which joins its slashes; pass it as a str: "
            f"'{collapsed[1]}://...'",
            object=text,
        )
    if _SCHEME.match(text):
        scheme, _, key = text.partition("://")
    else:
        # Not Path.as_uri: keys of under-stores are names as they are, without percent-encoding.
        scheme, key = "file", str(Path(text).resolve())
    key = key.strip("/")
    if (
        not key
        or (scheme == "torchcache" and "/" not in key)
        or any(segment in {"", ".", ".."} for segment in key.split("/"))
    ):
        raise ConfigurationError(
            f"{text!r} names no folder for a checkpoint; give it one without '.', '..' or empty segments",
            object=text,
        )
    return f"{scheme}:///{key}" if scheme == "file" else f"{scheme}://{key}"


def stock_id(uri: str) -> str:
    """How torch's own metadata names the checkpoint at a `checkpoint_uri`: one in the file system by its path."""
    return uri.removeprefix("file://")


def looks_like_checkpoint(path: object) -> bool:
    """Whether `checkpoint_uri` takes it and its scheme is one that under-stores have, or the pool's own."""
    try:
        uri = checkpoint_uri(path)  # type: ignore[arg-type]
    except (ConfigurationError, TypeError):
        return False
    return uri.startswith(("s3://", "file://", "torchcache://"))
