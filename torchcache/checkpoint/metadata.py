"""torch's Metadata from and to our manifest, and from a stock `.metadata` without trusting it."""

from __future__ import annotations

import collections
import enum
import io
import pathlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch.distributed.checkpoint import filesystem as stock
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from torchcache.checkpoint.columns import require
from torchcache.checkpoint.compression import DESCRIPTOR
from torchcache.checkpoint.location import stock_id
from torchcache.checkpoint.manifest import (
    Item,
    Manifest,
    Tensor,
    checked_name,
)
from torchcache.checkpoint.plain import NotPlainError, decode_plain, encode_plain
from torchcache.errors import CheckpointError, IntegrityError

StorageInfo = stock._StorageInfo
"""torch's own record of where an item lies: what FileSystemReader wants to find in `storage_data`."""

_MOST_PARTS: Final = 1000
"""Of a key in a `.metadata`: a name, and offsets in as many dimensions as tensors have."""

_MEMORY_FORMATS: Final = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve_format": torch.preserve_format,
}


# ---- stock .metadata ----


def _enum_member(cls: type[enum.Enum], name: str) -> enum.Enum:
    """Stands in for `getattr`, by which some Pythons pickle members of enums."""
    if isinstance(cls, type) and issubclass(cls, enum.Enum) and isinstance(name, str):
        return cls[name]
    raise pickle.UnpicklingError("getattr of something else than an enum")


def _layout(name: str) -> torch.layout:
    """Stands in for torch.serialization._get_layout."""
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name!r} is no layout")
    return layout


def _allowed() -> dict[tuple[str, str], Any]:
    """What a Metadata of FileSystemWriter, of torch 2.0 and later, is made of: records, sizes, paths, and no code."""
    names = (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
    allowed: dict[tuple[str, str], Any] = {
        (dcp.__name__, name): getattr(dcp, name) for name in names if hasattr(dcp, name)
    }
    # Before torch 2.3 these two lived with ShardedTensor.
    old_home = "torch.distributed._shard.sharded_tensor.metadata"
    allowed[old_home, "TensorProperties"] = dcp.TensorProperties
    allowed[old_home, "MEM_FORMAT_ENCODING"] = dcp._MEM_FORMAT_ENCODING
    allowed[stock.__name__, "_StorageInfo"] = stock._StorageInfo
    allowed["torch", "Size"] = torch.Size
    allowed["torch.serialization", "_get_layout"] = _layout
    for module in ("builtins", "__builtin__"):  # the second is what protocol 2 writes, for Python 2
        allowed[module, "getattr"] = _enum_member
        allowed[module, "set"] = set
    allowed["collections", "OrderedDict"] = collections.OrderedDict
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"):
            # A path of another system is only a name here.
            allowed[module, name] = pathlib.PurePosixPath
    return allowed


class _Unpickler(pickle._Unpickler):
    """Finds only what `_allowed` lists, torch's dtypes, and classes the user declared safe to torch itself.

    It is the pickle module's Python version, because only there can BUILD be kept to instances: given a class, it
    would set attributes of that class for the whole process.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = _allowed()
        for entry in torch.serialization.get_safe_globals():
            value, path = entry if isinstance(entry, tuple) else (entry, None)
            module, _, name = (path or f"{value.__module__}.{value.__qualname__}").rpartition(".")
            self._allowed.setdefault((module, name), value)
        # A member of an enum is one for the whole process: its state is nobody's to set.
        self._buildable = {
            value
            for value in self._allowed.values()
            if isinstance(value, type) and not issubclass(value, enum.Enum)
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise _RefusedError(f"{module}.{name}")
        return found

    def load_build(self) -> None:
        kind = type(self.stack[-2])  # type: ignore[attr-defined]
        if kind not in self._buildable:
            raise _RefusedError(f"the state of a {kind.__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    # What is hashed is looked at first: a tuple of the same tuple twice, sixty deep, takes forever to hash, and one
    # that is a hundred thousand deep ends the process.

    def load_setitem(self) -> None:
        _require_cheap(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _require_cheap(key)
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_additems(self) -> None:
        for value in self.stack:  # type: ignore[attr-defined]
            _require_cheap(value)
        super().load_additems()  # type: ignore[misc]

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        for value in self.stack:  # type: ignore[attr-defined]
            _require_cheap(value)
        super().load_frozenset()  # type: ignore[misc]

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_dict(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _require_cheap(key)
        super().load_dict()  # type: ignore[misc]

    dispatch[pickle.DICT[0]] = load_dict

    def load_reduce(self) -> None:
        for argument in self.stack[-1]:  # type: ignore[attr-defined]
            for value in argument if isinstance(argument, list | tuple) else (argument,):
                _require_cheap(value)
        super().load_reduce()  # type: ignore[misc]

    dispatch[pickle.REDUCE[0]] = load_reduce

    del dispatch[pickle.BYTEARRAY8[0]]  # it makes memory of whatever size is claimed; no checkpoint holds one


def _require_cheap(value: object) -> None:
    """Raises _RefusedError for a value that takes more than a moment to hash, in time or in depth."""
    left, waiting = _MOST_PARTS, [value]
    while waiting:
        part = waiting.pop()
        left -= 1
        if isinstance(part, tuple | frozenset | list):
            if len(part) > left:
                raise _RefusedError("a key of too many parts")
            waiting.extend(part)
        elif type(part) is MetadataIndex:
            waiting.extend(vars(part).values())


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is not on the list."""


def load_metadata(data: bytes, *, where: str) -> Metadata:
    """A `.metadata` file's Metadata, of which nothing was executed that isn't on a short list.

    Raises CheckpointError if it asks for anything else, IntegrityError if it is damaged; both name `where`.
    """
    try:
        metadata = _Unpickler(data).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{where} is a pickle that refers to {error}, which is not among what torch's own checkpoints hold: "
            "refused, and not executed. If you wrote it and trust it, declare the class with "
            "torch.serialization.add_safe_globals([...]) before loading",
            object=where,
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise IntegrityError(
            f"{where} is no readable metadata of a checkpoint: {error}", object=where
        ) from error
    _check(metadata, where=where)
    return metadata  # type: ignore[no-any-return]


def _check(metadata: object, *, where: str) -> None:
    """A pickle can also make allowed classes with absurd content: refuse what loading relies on and isn't so."""
    try:
        require(type(metadata) is Metadata, "it holds no Metadata")
        require(isinstance(metadata.state_dict_metadata, dict), "its state_dict_metadata is no dict")  # type: ignore[attr-defined]
        for index, info in metadata.storage_data.items():  # type: ignore[attr-defined]
            require(
                type(index) is MetadataIndex and type(info) is StorageInfo,
                "its storage_data is of another kind",
            )
            checked_name(info.relative_path)
            transforms = getattr(info, "transform_descriptors", None) or []
            require(
                isinstance(transforms, list | tuple) and all(type(one) is str for one in transforms),
                f"{index.fqn!r} has bad transforms",
            )
            for count in (info.offset, info.length):
                require(type(count) is int and count >= 0, f"{index.fqn!r} has a bad offset or length")
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{where} is not the metadata of a checkpoint of FileSystemWriter: {error}", object=where
        ) from error


# ---- writing ----


def stock_metadata(
    metadata: Metadata, items: Iterable[Item], *, checkpoint_id: str, save_id: str
) -> Metadata:
    """A copy of `metadata` as FileSystemWriter would write it: pickled, it is `.metadata`."""
    changes: dict[str, Any] = {
        "storage_data": {index_of(item): _storage_info(item) for item in items},
        "storage_meta": dcp.StorageMeta(checkpoint_id=stock_id(checkpoint_id), save_id=save_id),
    }
    if hasattr(metadata, "version"):
        changes["version"] = dcp_version()
    return replace(metadata, **changes)


def _storage_info(item: Item) -> StorageInfo:
    transforms = [DESCRIPTOR] if item.kind == "zstd" else list(item.transforms)
    if not transforms:
        return StorageInfo(item.file, item.start, item.length)
    if not knows_extensions():
        raise CheckpointError(
            f"{item.name!r} was saved through {', '.join(transforms)}, which a .metadata of torch {torch.__version__} "
            "can't tell: use torch 2.7 or newer"
        )
    return StorageInfo(item.file, item.start, item.length, transforms)


def knows_extensions() -> bool:
    """Whether this torch's `.metadata` can say that an item is compressed: from 2.7 on."""
    return "transform_descriptors" in StorageInfo.__dataclass_fields__


def dcp_version() -> str | None:
    """The version that this torch writes into Metadata."""
    return getattr(stock, "CURRENT_DCP_VERSION", None)


def index_of(item: Item) -> MetadataIndex:
    """The key of an item in storage_data."""
    return MetadataIndex(item.name, item.offset, item.index)


def describe(metadata: Metadata, *, pickled: bytes) -> dict[str, Any]:
    """The fields of a Manifest that come from Metadata; `pickled` is what `.metadata` will hold."""
    tensors: dict[str, Tensor] = {}
    objects = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            tensors[name] = _tensor(entry)
        else:
            objects.append(name)
    described: dict[str, Any] = {"tensors": tensors, "objects": tuple(objects)}
    try:
        described["planner_data"] = encode_plain(metadata.planner_data)
    except NotPlainError:
        described["pickled_bytes"] = len(pickled)
    return described


def _tensor(entry: dcp.TensorStorageMetadata) -> Tensor:
    properties = entry.properties
    return Tensor(
        dtype=dtype_name(properties.dtype),
        requires_grad=properties.requires_grad,
        pin_memory=properties.pin_memory,
        memory_format=str(properties.memory_format).removeprefix("torch."),
        size=tuple(entry.size),
        blocks=tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name that `dtype_name` made. Raises CheckpointError for one this torch doesn't have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"the checkpoint holds tensors of dtype {name!r}, which torch {torch.__version__} has not; load it with "
            "a newer torch"
        )
    return dtype


# ---- reading ----


def metadata_of(manifest: Manifest, *, load_id: str, pickled: Callable[[], Metadata]) -> Metadata:
    """torch's Metadata, with the manifest's Items as storage_data.

    `pickled` reads `.metadata`, for planner data that JSON has no form for.
    """
    entries: dict[str, Any] = {name: _entry(tensor) for name, tensor in manifest.tensors.items()}
    entries |= {name: dcp.BytesStorageMetadata() for name in manifest.objects}
    planner_data = pickled().planner_data if manifest.pickled_bytes else _planner_data(manifest)
    metadata = Metadata(
        state_dict_metadata=entries,
        planner_data=planner_data,
        storage_data={index_of(item): item for item in manifest.items},
        storage_meta=dcp.StorageMeta(
            checkpoint_id=stock_id(manifest.checkpoint), save_id=manifest.save_id, load_id=load_id
        ),
    )
    if hasattr(metadata, "version"):
        metadata.version = manifest.dcp_version
    return metadata


def _planner_data(manifest: Manifest) -> Any:
    try:
        return decode_plain(manifest.planner_data)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        raise IntegrityError(
            f"the manifest of the checkpoint {manifest.checkpoint} can't be used: its planner_data is damaged "
            f"({type(error).__name__}); load an older checkpoint",
            object=manifest.checkpoint,
        ) from error


def _entry(tensor: Tensor) -> dcp.TensorStorageMetadata:
    return dcp.TensorStorageMetadata(
        properties=dcp.TensorProperties(
            dtype=dtype_of(tensor.dtype),
            requires_grad=tensor.requires_grad,
            memory_format=_MEMORY_FORMATS.get(tensor.memory_format, torch.contiguous_format),
            pin_memory=tensor.pin_memory,
        ),
        size=torch.Size(tensor.size),
        chunks=[
            dcp.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in tensor.blocks
        ],
    )
