"""The formats of shards, found by a shard's name or by theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torchcache.data.formats.arrow import Arrow
from torchcache.data.formats.base import BlockFormat, Format, RecordFormat
from torchcache.data.formats.compression import CODECS
from torchcache.data.formats.jsonlines import JsonLines
from torchcache.data.formats.parquet import Parquet
from torchcache.data.formats.raw import Raw
from torchcache.data.formats.tar import Tar
from torchcache.data.formats.tfrecord import TFRecord
from torchcache.errors import ConfigurationError

__all__ = [
    "Arrow",
    "BlockFormat",
    "Format",
    "JsonLines",
    "Parquet",
    "Raw",
    "RecordFormat",
    "TFRecord",
    "Tar",
    "codec_of",
    "format_of",
    "is_shard",
]

_FORMATS: Final[tuple[Format, ...]] = (Tar(), Parquet(), Arrow(), TFRecord(), JsonLines())


def codec_of(key: str) -> str | None:
    """The compression of the shard `key`, by the end of its name; None for none."""
    return next((codec for suffix, codec in CODECS.items() if _spelt_out(key).endswith(suffix)), None)


def _spelt_out(key: str) -> str:
    lower = key.lower()
    return lower.removesuffix(".tgz") + ".tar.gz" if lower.endswith(".tgz") else lower


def _named(key: str) -> Format | None:
    name = _spelt_out(key)
    plain = next((name.removesuffix(suffix) for suffix in CODECS if name.endswith(suffix)), name)
    return next((format for format in _FORMATS if plain.endswith(format.suffixes)), None)


def is_shard(key: str) -> bool:
    """Whether the name `key` says a format."""
    return _named(key) is not None


def format_of(given: str | Format | None, keys: Iterable[str]) -> Format:
    """The format: `given`, or the one that the names of all shards say.

    Raises ConfigurationError for an unknown one, and for names that say none or several.
    """
    names = ", ".join(format.name for format in _FORMATS)
    if isinstance(given, RecordFormat | BlockFormat):
        return given
    if given is not None:
        for format in _FORMATS:
            if given == format.name:
                return format
        hint = "for raw records give torchcache.data.formats.Raw(record_bytes=...)" if given == "raw" else ""
        raise ConfigurationError(f"format={given!r}: it is one of {names}{'; ' + hint if hint else ''}")
    found: dict[str, tuple[Format, str]] = {}
    for key in keys:
        format_ = _named(key)
        if format_ is None:
            raise ConfigurationError(
                f"the name of {key} says no format: give format=, one of {names}, or Raw(record_bytes=...)",
                object=key,
            )
        found.setdefault(format_.name, (format_, key))
    if len(found) > 1:
        told = ", ".join(f"{key} ({name})" for name, (_, key) in sorted(found.items()))
        raise ConfigurationError(f"a dataset has one format, these are several: {told}")
    return next(iter(found.values()))[0]
