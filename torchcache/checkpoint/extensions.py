"""DCP's stream extensions, which torch still calls experimental: an item's bytes piped through what the user brings.

See torch/distributed/checkpoint/_extension.py. An item's descriptors name the transforms in the order of undoing them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, Final, cast

from torchcache.checkpoint.compression import decompressed_limit
from torchcache.errors import CheckpointError, ConfigurationError, IntegrityError

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

_PIECE_BYTES: Final = 1024 * 1024


def require_streams(extensions: Sequence[Any] | None) -> tuple[StreamTransformExtension, ...]:
    """What users give as `_extensions`. Raises ConfigurationError for what transforms no streams,
    and for several: what stock makes of them it can't read itself."""
    for extension in extensions or ():
        if not callable(getattr(extension, "transform_to", None)):
            raise ConfigurationError(
                f"_extensions takes StreamTransformExtensions, not {type(extension).__name__}"
            )
    if len(extensions or ()) > 1:
        raise ConfigurationError(
            "torch 2.13 undoes several _extensions in the order in which it applied them, so what they made can't be "
            "read: give one"
        )
    return tuple(extensions or ())


def descriptors_of(extensions: Sequence[StreamTransformExtension]) -> tuple[str, ...]:
    """What `.metadata` says of items that went through `extensions`."""
    return tuple(extension.get_descriptor() for extension in reversed(extensions))


class _Collected(io.BytesIO):
    """Transforms close what they write to; what was written is wanted after that."""

    def close(self) -> None:
        pass


def transform(
    parts: Sequence[bytes | memoryview], extensions: Sequence[StreamTransformExtension]
) -> memoryview:
    """`parts`, one behind the other, as they come out of the last of `extensions`."""
    collected = _Collected()
    stream = cast(IO[bytes], collected)
    for extension in extensions:
        stream = extension.transform_to(stream)
    for part in parts:
        for at in range(0, len(part), _PIECE_BYTES):
            stream.write(part[at : at + _PIECE_BYTES])
    stream.close()
    return collected.getbuffer()


def extensions_of(
    descriptors: Sequence[str], registry: ExtensionRegistry | None, *, name: str
) -> Sequence[StreamTransformExtension]:
    """What undoes the transforms of the item `name`. Raises CheckpointError for those that `registry`, or torch's own
    where it is None, can't give."""
    through = f"{name!r} was saved through the stream extensions {', '.join(map(str, descriptors))}"
    try:
        from torch.distributed.checkpoint._extension import ExtensionRegistry
    except ImportError as error:
        raise CheckpointError(f"{through}: load it with torch 2.7 or newer") from error
    try:
        found = (registry or ExtensionRegistry()).from_descriptor_list(descriptors)
    except Exception as error:  # torch hands on whatever an extension raises
        raise CheckpointError(
            f"{through} ({type(error).__name__}: {error}): register them, in versions that read this, in the "
            "ExtensionRegistry given as CacheStorageReader(_extension_registry=...)"
        ) from error
    return cast("Sequence[StreamTransformExtension]", found)


def undo(
    blob: bytes | bytearray,
    descriptors: Sequence[str],
    registry: ExtensionRegistry | None,
    *,
    tensor_bytes: int | None,
    name: str,
) -> bytes:
    """What went into `transform`; `tensor_bytes` as for `decompress`.

    Raises CheckpointError as `extensions_of`, IntegrityError for what they can't undo, or what gets larger than it may.
    """
    extensions = extensions_of(descriptors, registry, name=name)
    most = decompressed_limit(len(blob), tensor_bytes=tensor_bytes)
    found = bytearray()
    try:
        stream = cast(IO[bytes], io.BytesIO(blob))
        for extension in extensions:
            stream = extension.transform_from(stream)
        while len(found) <= most and (piece := stream.read(_PIECE_BYTES)):
            found += piece
    except Exception as error:  # of a foreign library's own kinds
        raise IntegrityError(f"{name!r} can't be read through its stream extensions: {error}") from error
    if len(found) > most:
        raise IntegrityError(f"{name!r} becomes more than {most} bytes by its stream extensions: refused")
    return bytes(found)
