"""Checkpoints as files of other formats, in a folder of this machine: checked on the way, whole or not there."""

from __future__ import annotations

import io
import math
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from torchcache.checkpoint.compression import decompress
from torchcache.checkpoint.manifest import Item, by_file, frame_digest
from torchcache.checkpoint.opened import OpenCheckpoint
from torchcache.checkpoint.safetensors_writing import Block, FilePlan, index_of, plan_files
from torchcache.errors import ConfigurationError, IntegrityError
from torchcache.model import ByteRange
from torchcache.pool import Pool
from torchcache.save_names import METADATA_NAME

Progress = Callable[[int, int], None]
"""Gets (tensors, bytes) just written."""

Memory = np.ndarray[tuple[Any, ...], np.dtype[np.uint8]]

_PARTIAL: Final = ".partial"


@dataclass(slots=True, kw_only=True)
class Exported:
    """What an export wrote: names of files, and counts."""

    files: list[str] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    left_out: int = 0


class SafetensorsExport:
    """The tensors of a checkpoint whose names start with `prefix`, without it, as safetensors files.

    `folder` must be empty, or not there. Files are begun anew after `max_file_bytes`. Raises ConfigurationError for a
    tensor that the format has no form for, or if there is none at all; NotCommitted.
    """

    def __init__(self, pool: Pool, uri: str, folder: str, *, prefix: str = "", max_file_bytes: int) -> None:
        self._checkpoint = OpenCheckpoint(pool, uri)
        self._folder = _empty(folder)
        manifest = self._checkpoint.manifest
        self.left_out = len([name for name in manifest.objects if name.startswith(prefix)])
        self._files = plan_files(manifest, prefix=prefix, max_file_bytes=max_file_bytes)
        if not self._files:
            raise ConfigurationError(f"{uri} has no tensor whose name starts with {prefix!r}", object=uri)
        self.tensors = sum(len(plan.places) for plan in self._files)
        self.bytes = sum(place.size for plan in self._files for place in plan.places)

    def run(self, on_progress: Progress) -> Exported:
        """Writes the files, the index last. Raises IntegrityError for a byte that is wrong."""
        done = Exported(tensors=self.tensors, bytes=self.bytes, left_out=self.left_out)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._checkpoint.held():
            for plan in self._files:
                with _new_file(self._folder / plan.name, plan.size) as memory:
                    memory[: len(plan.head)] = np.frombuffer(plan.head, np.uint8)
                    self._fill(plan, memory, on_progress)
                done.files.append(plan.name)
        if len(self._files) > 1:
            name = "model.safetensors.index.json"
            (self._folder / name).write_bytes(index_of(self._files))
            done.files.append(name)
        return done

    def _fill(self, plan: FilePlan, memory: Memory, on_progress: Progress) -> None:
        for place in plan.places:
            target = memory[place.start : place.start + place.size]
            for block in place.blocks:
                if block.is_whole and block.item.kind == "tensor":
                    self._checkpoint.fetch(block.item, target.data)
                    continue
                data = np.empty(block.item.payload_length, np.uint8)
                self._checkpoint.fetch(block.item, data.data)
                if block.item.kind == "zstd":
                    data = _unpacked(block, data, math.prod(block.lengths) * place.item_bytes)
                whole = target.reshape(*place.shape, place.item_bytes)
                box = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.lengths, strict=True))
                whole[box] = data.reshape(*block.lengths, place.item_bytes)
            on_progress(1, place.size)


class DcpExport:
    """A checkpoint as torch.distributed.checkpoint's FileSystemReader reads it. `folder` as for SafetensorsExport."""

    def __init__(self, pool: Pool, uri: str, folder: str) -> None:
        self._checkpoint = OpenCheckpoint(pool, uri)
        self._folder = _empty(folder)
        manifest = self._checkpoint.manifest
        self._items = dict(by_file(manifest.items))
        self._sizes = manifest.files
        self.tensors = len(manifest.tensors)
        self.bytes = sum(self._sizes.values())

    def run(self, on_progress: Progress) -> Exported:
        """Writes the files, `.metadata` last. Raises IntegrityError for a byte that is wrong."""
        done = Exported(tensors=self.tensors, bytes=self.bytes)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._checkpoint.held():
            for name, size in self._sizes.items():
                with _new_file(self._folder / name, size) as memory:
                    self._checkpoint.fetch_file(name, size, memory.data)
                    for item in self._items.get(name, ()):
                        _check(item, memory.data)
                        on_progress(1, item.length)
                done.files.append(name)
            metadata = pickle.dumps(self._checkpoint.stock_metadata())
        _publish(self._folder / METADATA_NAME, metadata)
        done.files.append(METADATA_NAME)
        return done


def _unpacked(block: Block, data: Memory, size: int) -> Memory:
    """The elements of a compressed block, `size` bytes. Imports torch. Raises IntegrityError."""
    import torch

    from torchcache.checkpoint.frame import bytes_of

    blob = decompress(data.tobytes(), tensor_bytes=size, name=block.item.name)
    tensor = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or tensor.nbytes != size:
        raise IntegrityError(f"{block.item.name!r} isn't the tensor that the manifest speaks of")
    return np.frombuffer(bytes_of(tensor.contiguous()), np.uint8)


def _check(item: Item, file: memoryview) -> None:
    start, payload, end = item.start, item.payload, item.start + item.length
    item.verify(ByteRange(0, item.payload_length), file[payload.start : payload.end])
    if frame_digest(file[start : payload.start], file[payload.end : end]) != item.frame_digest:
        raise IntegrityError(f"the frame of {item.name!r} in file {item.file} does not match its checksum")


def _empty(folder: str) -> Path:
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(f"{folder} is there already and not empty: give a new folder", object=folder)
    return path


class _new_file:  # noqa: N801 - reads as the statement it is
    """A file's memory, to be filled in the block; it gets its name only after that, synced."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
        self._size = size

    def __enter__(self) -> Memory:
        with self._partial.open("wb") as file:
            file.truncate(self._size)
        if not self._size:
            self._memory: Memory = np.empty(0, np.uint8)
        else:
            self._memory = np.memmap(self._partial, np.uint8, mode="r+")
        return self._memory

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._partial.unlink()
            return
        if isinstance(self._memory, np.memmap):
            self._memory.flush()
        self._partial.replace(self._path)


def _publish(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    partial.write_bytes(data)
    partial.replace(path)
