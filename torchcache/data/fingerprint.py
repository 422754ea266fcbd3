"""A name for a dataset, from what it is: its classes' source code and its attributes.

Two datasets of one fingerprint return the same samples as far as their own code and data go. What can't be looked
into, as a function, an open file or an object of an unknown class, is refused instead of guessed at. Code that a
class calls elsewhere, and files that it reads, are not seen: that is what `version=` is for.
"""

from __future__ import annotations

import enum
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from types import FunctionType
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from torchcache.data.leaves import tensor_bytes, tensor_problem
from torchcache.data.records import reference
from torchcache.errors import ConfigurationError

_SCALARS: Final = frozenset({str, int, float, bool, complex, bytes, type(None)})
_MAX_DEPTH = 100
_SLICE = 4096


def fingerprint(dataset: Any) -> str:
    """32 hex digits. Raises ConfigurationError naming the attribute that can't be looked into."""
    return _Fingerprint().of_dataset(dataset, "dataset").hex()


class _Fingerprint:
    """Digests of values, each made of the digests of its parts. `path` is how messages name the value."""

    def __init__(self) -> None:
        self._depth = 0

    def of(self, value: object, path: str) -> bytes:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _refusal(path, "lies too deep; does it contain itself?")
        try:
            return self._of(value, path)
        finally:
            self._depth -= 1

    def of_dataset(self, dataset: Any, path: str) -> bytes:
        if isinstance(dataset, list | tuple | np.ndarray | torch.Tensor):
            return self.of(dataset, path)
        names = sorted(_attributes(dataset))
        parts = [_class_digest(type(dataset), path)]
        for name in names:
            parts += [name.encode(), self.of(getattr(dataset, name), f"{path}.{name}")]
        return _digest("dataset", *parts)

    def _of(self, value: object, path: str) -> bytes:
        for kind_of in (self._of_plain, self._of_container, self._of_content):
            digest = kind_of(value, path)
            if digest is not None:
                return digest
        kind = type(value)
        raise _refusal(path, f"is a {kind.__module__}.{kind.__qualname__}, which can't be looked into")

    def _of_plain(self, value: object, path: str) -> bytes | None:
        name = type(value).__name__
        if type(value) in _SCALARS:
            return _digest(name, repr(value).encode("utf-8", "surrogatepass"))
        if isinstance(value, enum.Enum):
            return _digest(
                "enum", reference(type(value)).encode(), value.name.encode(), self.of(value.value, path)
            )
        if isinstance(value, PurePath):
            return _digest("path", str(value).encode("utf-8", "surrogateescape"))
        if isinstance(value, range | slice | torch.dtype | torch.device | np.dtype):
            return _digest(name, repr(value).encode())
        return None

    def _of_container(self, value: object, path: str) -> bytes | None:
        kind = type(value)
        if isinstance(value, list | tuple) and kind in (list, tuple):
            return self._of_sequence(value, path)
        if isinstance(value, set | frozenset) and kind in (set, frozenset):
            return _digest(kind.__name__, *sorted(self.of(v, f"{path}{{…}}") for v in value))
        if isinstance(value, Mapping) and kind.__module__ in ("builtins", "collections"):
            pairs = ((self.of(k, f"{path} key"), self.of(v, f"{path}[{k!r}]")) for k, v in value.items())
            return _digest(kind.__name__, *itertools.chain.from_iterable(pairs))
        return None

    def _of_content(self, value: object, path: str) -> bytes | None:
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self._of_array(np.asarray(value), path)
        if isinstance(value, Dataset):
            return self.of_dataset(value, path)
        return None

    def _of_sequence(self, value: list[object] | tuple[object, ...], path: str) -> bytes:
        name = type(value).__name__
        if _is_plain(value):
            # The long lists of paths and labels that datasets hold: at the speed of repr, which tells scalars apart.
            slices = (value[at : at + _SLICE] for at in range(0, len(value), _SLICE))
            return _digest(f"plain {name}", *(repr(s).encode("utf-8", "surrogatepass") for s in slices))
        return _digest(name, *(self.of(v, f"{path}[{i}]") for i, v in enumerate(value)))

    def _of_tensor(self, tensor: torch.Tensor, path: str) -> bytes:
        tensor = tensor.detach()
        problem = tensor_problem(tensor)
        if problem:
            raise _refusal(path, f"is a tensor that can't be looked into: {problem}")
        return _digest("tensor", f"{tensor.dtype} {tuple(tensor.shape)}".encode(), tensor_bytes(tensor).data)

    def _of_array(self, array: np.ndarray[Any, Any], path: str) -> bytes:
        shape = f"{array.dtype.descr} {array.shape}".encode()
        if array.dtype.hasobject:
            return _digest("objects", shape, self.of(array.reshape(-1).tolist(), path))
        return _digest("array", shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _is_plain(values: Sequence[object]) -> bool:
    """Whether all are scalars, or all are tuples of scalars."""
    kinds = set(map(type, values))
    if kinds == {tuple}:
        kinds = set(map(type, itertools.chain.from_iterable(values)))  # type: ignore[arg-type]
    return kinds <= _SCALARS


def _digest(kind: str, *parts: bytes | memoryview) -> bytes:
    """xxh3-128 over the parts, each behind its length."""
    hasher = xxhash.xxh3_128(kind.encode())
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return bytes(hasher.digest())


def _attributes(value: object) -> Iterator[str]:
    yield from getattr(value, "__dict__", ())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def _class_digest(kind: type, path: str) -> bytes:
    """Of the class and its bases by name, and by source code where they are neither Python's nor torch's."""
    parts = []
    for base in kind.__mro__:
        parts.append(reference(base).encode())
        package = base.__module__.partition(".")[0]
        if package != "torch" and (package == "__main__" or package not in sys.stdlib_module_names):
            parts.append(_source(base, path).encode())
    return _digest("class", *parts)


def _source(kind: type, path: str) -> str:
    for name, member in vars(kind).items() if "<locals>" in kind.__qualname__ else ():
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        free = (
            set(function.__code__.co_freevars) - {"__class__"} if isinstance(function, FunctionType) else ()
        )
        if free:
            raise _refusal(
                f"{path}.{name}", f"depends on {', '.join(sorted(free))} of the function around its class"
            )
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError) as error:
        raise _refusal(
            path, f"is a {kind.__qualname__}, whose source code can't be found ({error})"
        ) from error


def _refusal(path: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"can't name this dataset by what it is: {path} {reason}. Pass name= to CachedDataset, and another version= "
        "whenever its samples change"
    )
