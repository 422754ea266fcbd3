"""Weights out of safetensors files, through the pool and straight into their tensors."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import torch

from torchcache.checkpoint.host_memory import new_tensor
from torchcache.checkpoint.loading import Load, fetch_box, memory_of, run_loads
from torchcache.checkpoint.location import checkpoint_uri
from torchcache.checkpoint.safetensors_layout import TORCH_DTYPES, StoredTensor, box_of, item_of, torch_shape
from torchcache.checkpoint.safetensors_shards import INDEX_SUFFIX, SUFFIX, Shards
from torchcache.connecting import connect
from torchcache.errors import CheckpointError, ConfigurationError, ObjectNotFound
from torchcache.local_pool import LocalPool
from torchcache.pool import Pool
from torchcache.pool.storage_uris import at_storage

_USUAL_NAME: Final = "model"

Device = str | int | torch.device


def load_safetensors(
    uri: str | os.PathLike[str],
    *,
    keys: Iterable[str] | None = None,
    device: Device = "cpu",
    pool: str | Pool | LocalPool | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors checkpoint, by name: all, or those of `keys`, in that order.

    `uri` is one file ("s3://bucket/llama/model.safetensors", or a path), the index of a checkpoint in several
    ("....safetensors.index.json"), or a folder that holds either under its usual name, "model". `pool` is what
    `torchcache.connect` takes. Only the header and the bytes of the wanted tensors are read; they come from the pool's
    cache, or once from storage for all processes that ask, and are received straight into the tensors' memory. For
    another device than the CPU they pass through CPU memory, a few at a time.

    Raises ObjectNotFound, ObjectChanged if a file is overwritten meanwhile, IntegrityError for a file or index that is
    damaged or hostile, ConfigurationError for a name that isn't there, CheckpointError for a dtype torch doesn't have.
    """
    with open_safetensors(uri, device=device, pool=pool) as file:
        return file.get_tensors(keys)


def open_safetensors(
    uri: str | os.PathLike[str], *, device: Device = "cpu", pool: str | Pool | LocalPool | None = None
) -> SafetensorsFile:
    """A safetensors checkpoint whose tensors, or slices of them, are fetched when they are asked for.

    As `safetensors.safe_open`, over the pool; arguments and errors are those of `load_safetensors`.
    """
    connected = connect(pool)
    found = _find(connected, at_storage(connected, checkpoint_uri(uri)))
    return SafetensorsFile(Shards.open(connected, found), torch.device(device))


def _find(pool: Pool, uri: str) -> str:
    """The file or index that `uri` names, or that lies under its usual name in the folder `uri`."""
    if uri.endswith((SUFFIX, INDEX_SUFFIX)):
        return uri
    candidates = [f"{uri}/{_USUAL_NAME}{suffix}" for suffix in (INDEX_SUFFIX, SUFFIX)]
    for candidate in candidates:
        try:
            pool.stat(candidate)
        except ObjectNotFound:
            continue
        return candidate
    raise ObjectNotFound(
        f"{uri} holds neither {' nor '.join(c.rpartition('/')[2] for c in candidates)}; name the file itself",
        object=uri,
    )


class SafetensorsFile:
    """What `open_safetensors` gives: a context manager, though nothing is held open. Thread-safe; pickles."""

    def __init__(self, shards: Shards, device: torch.device) -> None:
        self._shards = shards
        self._device = device

    def __repr__(self) -> str:
        return f"SafetensorsFile({self._shards.uri!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def keys(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._shards.names)

    def offset_keys(self) -> list[str]:
        """The tensors' names by where they lie, file by file. Opens all files of a sharded checkpoint."""
        return [tensor.name for tensor in sorted(self._shards.located(self._shards.names))]

    def __contains__(self, name: object) -> bool:
        return name in self._shards.names

    def __len__(self) -> int:
        return len(self._shards.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def metadata(self) -> dict[str, Any] | None:
        """The file's own metadata, texts by name, or None; of a sharded checkpoint, its index's."""
        return self._shards.metadata

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the device."""
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Several tensors at once, or all: many small ones cost few requests."""
        if isinstance(names, str):
            raise ConfigurationError(f"names are given as a list: [{names!r}]")
        wanted = list(self.keys() if names is None else dict.fromkeys(names))
        tensors: dict[str, torch.Tensor] = dict.fromkeys(wanted, _NOTHING)
        loads = (_TensorLoad(tensor, ..., self._device, tensors) for tensor in sorted(self._located(wanted)))
        run_loads(loads, self._shards.source)
        return tensors

    def get_slice(self, name: str) -> SafetensorsSlice:
        """The tensor, to be indexed: only what of it is asked for is fetched, row by row where that is less."""
        (tensor,) = self._located([name])
        return SafetensorsSlice(self._shards, tensor, self._device)

    def _located(self, names: Sequence[str]) -> list[StoredTensor]:
        for name in names:
            if name not in self._shards.names:
                near = difflib.get_close_matches(str(name), self._shards.names, n=3)
                hint = f"like it: {', '.join(near)}" if near else f"it has {len(self)} others"
                raise ConfigurationError(
                    f"{self._shards.uri} has no tensor {name!r}; {hint}", object=self._shards.uri
                )
        return self._shards.located(names)


class SafetensorsSlice:
    """One tensor of a `SafetensorsFile`, not fetched yet."""

    def __init__(self, shards: Shards, tensor: StoredTensor, device: torch.device) -> None:
        self._shards = shards
        self._tensor = tensor
        self._device = device

    def get_shape(self) -> list[int]:
        """The shape that the file gives. (Two elements of F4 share a byte: torch's last dimension is half of it.)"""
        return list(self._tensor.entry.shape)

    def get_dtype(self) -> str:
        """The dtype as the format calls it, like "BF16"."""
        return self._tensor.entry.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What indexing the whole tensor with integers, slices and `...` gives. Raises IndexError."""
        found: dict[str, torch.Tensor] = {}
        run_loads([_TensorLoad(self._tensor, index, self._device, found)], self._shards.source)
        return found[self._tensor.name]


_NOTHING: Final = torch.empty(0, device="cpu")


class _TensorLoad(Load):
    """A tensor, or what `index` takes of it, on its way to `results`."""

    def __init__(
        self, tensor: StoredTensor, index: Any, device: torch.device, results: dict[str, torch.Tensor]
    ) -> None:
        entry = tensor.entry
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{tensor.name!r} is of dtype {entry.dtype}, which torch {torch.__version__} has not",
                object=tensor.name,
            )
        self._name = tensor.name
        self._device = device
        self._results = results
        box, self._then = box_of(torch_shape(tensor), index)
        self._target = new_tensor(box.lengths, dtype)
        # Not every dtype of one byte can be copied; all can be looked at as bytes.
        self._raw = self._target.view(torch.uint8) if dtype.itemsize == 1 else self._target
        self.fetches, self._source = fetch_box(item_of(tensor, box.shape), box, self._raw.dtype, self._raw)
        passes_through = 0 if device.type == "cpu" else self._target.nbytes
        self.extra_bytes = passes_through + memory_of(self._source)

    def finish(self) -> None:
        if self._source is not None:
            self._raw.copy_(self._source)
        tensor = self._target
        if self._then:
            part = self._raw[self._then].clone(memory_format=torch.contiguous_format)
            tensor = part.view(tensor.dtype)
        self._results[self._name] = tensor.to(self._device)
