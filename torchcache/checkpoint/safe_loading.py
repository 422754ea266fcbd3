"""torch's weights_only loading, and plain values that it refuses: numpy's arrays and numbers, `b""`, frozenset, range.

numpy's own functions would take more than they should: a pickled dtype can say that numbers are pointers. So ours stand
in for them while a value is loaded that names them. What they make isn't numpy's yet: `load_safely` writes it anew, as
numpy would have, and loads that.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor

from torchcache.errors import CheckpointError

_KINDS: Final = "biufcSU"
"""Of dtypes: elements that are nothing but their bytes."""

_CODE: Final = re.compile(f"[{_KINDS}][0-9]{{1,9}}")
_ORDERS: Final = frozenset("<>|=")
_lock: Final = threading.Lock()


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(f"a dtype of {code!r}")
        self.real = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, order, *rest = state
        # Without fields, without a shape of its own, and nothing said of its size that its code hasn't.
        if version != 3 or order not in _ORDERS or rest[:3] != [None, None, None]:
            raise ValueError("a dtype that has parts")
        self.real = self.real.newbyteorder(order)

    def __reduce__(self) -> Any:
        return self.real.__reduce__()


class _Array:
    """Stands in for numpy.ndarray."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        elements = _elements(dtype, data)
        self._real = elements.reshape(shape, order="F" if is_fortran else "C")

    def __reduce__(self) -> Any:
        return self._real.__reduce__()


def _elements(dtype: object, data: object) -> np.ndarray[Any, Any]:
    if type(dtype) is not _Dtype or type(data) is not bytes:
        raise ValueError("an array of something else than numbers or texts")
    return np.frombuffer(data, dtype.real)


def _array(kind: object, shape: object, code: object) -> _Array:
    """Stands in for numpy's _reconstruct, which makes an empty one that is told its content later."""
    if kind is not _Array:
        raise ValueError("an array of a class of its own")
    return _Array()


def _scalar(dtype: object, data: object) -> Any:
    elements = _elements(dtype, data)
    if len(elements) != 1:
        raise ValueError("a number of another size than its dtype says")
    return elements[0]


def _empty_bytes() -> bytes:
    """Stands in for bytes, which would take a number too, and as much memory. Others' bytes are pickled otherwise."""
    return b""


_STAND_INS: Final[list[tuple[Callable[..., Any], str]]] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    (_empty_bytes, "builtins.bytes"),
    (frozenset, "builtins.frozenset"),
    (range, "builtins.range"),
]


def load_safely(blob: bytes | bytearray) -> Any:
    """The value of a torch.save blob, of which nothing is executed that torch's weights_only loading, or this, has not
    on its list. Raises whatever torch does."""
    try:
        return torch.load(io.BytesIO(blob), weights_only=True)
    except Exception:
        named = unsafe_names(blob)
        if not named or not set(named) <= {name for _, name in _STAND_INS}:
            raise
    # torch's list is the process's: two that took their names off it at different times would disturb each other.
    with _lock, torch.serialization.safe_globals(list(_STAND_INS)):
        found = torch.load(io.BytesIO(blob), weights_only=True)
    anew = io.BytesIO()
    torch.save(found, anew)
    anew.seek(0)
    return torch.load(anew, weights_only=False)


def unsafe_names(blob: bytes | bytearray) -> list[str]:
    """What a torch.save blob refers to that torch's weights_only loading doesn't allow; [] also if it is none."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(blob)))
    except Exception:  # noqa: BLE001 - it only adds names to an error
        return []


_PACKED: Final = frozenset({torch.quint4x2, torch.quint2x4})
_PLAIN: Final = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})


def require_loadable(value: object, name: str) -> None:
    """Raises CheckpointError for what in `value`, an entry of a state, can't be saved or loaded again safely: names it.

    Tensors of a class of their own are told by that class.
    """
    kind = type(value)
    if kind in _PLAIN:
        return
    if isinstance(value, torch.Tensor):
        _require_tensor(value, name)
    elif isinstance(value, Mapping) and value:
        for key, inner in value.items():
            require_loadable(inner, f"{name}.{key}")
    elif kind in (list, tuple) and isinstance(value, Sequence) and value:
        for number, inner in enumerate(value):
            require_loadable(inner, f"{name}.{number}")
    elif not _is_plain_numpy(value):
        _try(value, name)


def _require_tensor(tensor: torch.Tensor, name: str) -> None:
    kind = type(tensor)
    is_plain = kind in (torch.Tensor, torch.nn.Parameter, DTensor) and tensor.layout is torch.strided
    if is_plain and _has_size(tensor.dtype) and not (tensor.is_meta or tensor.is_nested):
        return
    try:
        if not _has_size(tensor.dtype):
            raise TypeError(f"torch doesn't know the size of {tensor.dtype}")
        if tensor.is_meta:
            raise TypeError("it is on the meta device and has no data; materialise it first")
        if tensor.dtype in _PACKED:
            raise TypeError(f"torch can't copy {tensor.dtype}, so nothing could be loaded from it")
        _create_write_items(name, tensor)
    except Exception as error:
        raise CheckpointError(
            f"{name!r}, a {kind.__module__}.{kind.__qualname__}, can't be saved: {_first_line(error)}",
            object=name,
        ) from error
    if not hasattr(kind, "__create_write_items__") and kind.__module__.partition(".")[0] != "torch":
        _try(kind, name)


@lru_cache(maxsize=256)
def _has_size(dtype: torch.dtype) -> bool:
    """Whether torch can tell how large an element is; of some dtypes that have a name only it can't."""
    try:
        return bool(torch._utils._element_size(dtype))  # type: ignore[no-untyped-call]
    except TypeError:
        return False


def _is_plain_numpy(value: object) -> bool:
    if type(value) is not np.ndarray and not isinstance(value, np.generic):
        return False
    return value.dtype.kind in _KINDS


def _try(value: object, name: str) -> None:
    """Raises CheckpointError unless `value` comes back; a class stands for what is of it."""
    blob = io.BytesIO()
    try:
        torch.save(value, blob)
        load_safely(blob.getvalue())
    except Exception as error:
        found = ", ".join(unsafe_names(blob.getvalue())) or _first_line(error)
        kind = value if isinstance(value, type) else type(value)
        raise CheckpointError(
            f"{name!r}, a {kind.__module__}.{kind.__qualname__}, can't be loaded safely again ({found}). "
            "Let the state hold tensors, numbers, texts, bytes, lists, tuples, dicts and numpy arrays of numbers; a "
            "class of your own that you trust, allow with torch.serialization.add_safe_globals([...]), here and where "
            "it is loaded",
            object=name,
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
