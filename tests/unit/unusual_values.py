"""Tensors and other values that a state may hold and seldom does, each made anew when it is asked for."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)

KNOWN_DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
)
"""Those that have to be supported, whatever torch this is; it may have more."""


def random_bits(dtype: torch.dtype, shape: tuple[int, ...] = (5, 7)) -> torch.Tensor:
    """Every bit by chance, so also what is no number; but of bools."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(3)
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, most, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = torch.empty(shape, dtype=dtype)
    if count:
        tensor.untyped_storage().copy_(raw.untyped_storage())
    return tensor


def bits_of(tensor: torch.Tensor) -> bytes:
    """The elements, row-major, by a way of its own."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    return bytes(plain.untyped_storage().tolist()[: plain.numel() * plain.element_size()])  # type: ignore[no-untyped-call]


def _w() -> torch.Tensor:
    return torch.arange(60.0).reshape(6, 10)


def _c() -> torch.Tensor:
    return torch.complex(_w(), _w() + 1)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "0-dim": lambda: torch.tensor(3.5),
    "0-dim of a row": lambda: _w()[3, 4],
    "empty": lambda: torch.empty(0),
    "empty in the middle": lambda: torch.empty(3, 0, 2, dtype=torch.int8),
    "empty conjugate": lambda: torch.empty(0, 4, dtype=torch.complex64).conj(),
    "transposed": lambda: _w().t(),
    "permuted": lambda: torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "expanded 0-dim": lambda: torch.tensor(2.0).expand(5, 5),
    "narrowed": lambda: _w().narrow(1, 3, 4),
    "rows": lambda: _w()[2:5],
    "at an odd byte": lambda: torch.arange(100, dtype=torch.uint8)[7:70],
    "stepped": lambda: _w()[::2, ::3],
    "channels last": lambda: torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: (
        torch.arange(720.0).reshape(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    ),
    "overlapping": lambda: torch.as_strided(torch.arange(100.0), (10, 5), (1, 1)),
    "overlapping at an offset": lambda: torch.as_strided(torch.arange(100), (4, 4), (2, 3), 9),
    "one row of a stride": lambda: torch.as_strided(torch.arange(100), (1, 5), (77, 1)),
    "flipped": lambda: torch.arange(12.0).reshape(3, 4).flip(0, 1),
    "conjugate": lambda: _c().conj(),
    "conjugate transposed": lambda: _c().t().conj(),
    "conjugate 0-dim": lambda: _c().conj()[1, 2],
    "conjugate halves": lambda: torch.view_as_complex(torch.ones(3, 2, dtype=torch.float16)).conj(),
    "imaginary of a conjugate": lambda: _c().conj().imag,
    "negative": lambda: torch._neg_view(_w()),
    "negative integers": lambda: torch._neg_view(torch.arange(6)),
    "negative conjugate": lambda: torch._neg_view(_c().conj()),
    "real": lambda: _c().real,
    "parameter": lambda: torch.nn.Parameter(_w()),
    "parameter transposed": lambda: torch.nn.Parameter(_w().t()),
    "parameter of integers": lambda: torch.nn.Parameter(torch.arange(4), requires_grad=False),
    "buffer": lambda: torch.nn.Buffer(_w()),
    "of a graph": lambda: _w().requires_grad_() * 2,
    "of numpy's memory": lambda: torch.from_numpy(np.arange(12).reshape(3, 4).T),
    "of inference": lambda: _of_inference()[:2],
    "of forty-one dimensions": lambda: torch.ones(2).reshape((1,) * 40 + (2,)),
}
"""Strided ones, of no class of their own: stock takes them too."""


def _of_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.arange(3.0)


SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "coo with one place twice": lambda: torch.sparse_coo_tensor(
        [[0, 0, 1], [1, 1, 2]], [1.0, 2.0, 3.0], (3, 4)
    ),
    "coo of rows": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)),
    "coo empty": lambda: torch.sparse_coo_tensor(size=(3, 4)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
}

Point = collections.namedtuple("Point", "x y")

VALUES: dict[str, Callable[[], Any]] = {
    "int": lambda: 3,
    "large int": lambda: 10**400,
    "least int": lambda: -(2**63) - 1,
    "float": lambda: math.inf,
    "complex": lambda: 1 + 2j,
    "text": lambda: "x\0é\U0001f600",
    "half a surrogate": lambda: "\ud800",
    "bytes": lambda: bytes(range(256)) * 100,
    "no bytes": lambda: b"",
    "no bytes in a list": lambda: [b"", (b"", {b"": b""})],
    "bytearray": lambda: bytearray(b"abc"),
    "none": lambda: None,
    "bool": lambda: True,
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset([1, (2, "x")]),
    "tuple": lambda: (1, (2, [3])),
    "empty list": lambda: [],
    "empty dict": lambda: {},
    "empty tuple": lambda: (),
    "range": lambda: range(3, 9, 2),
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([1, 2]),
    "numpy": lambda: np.arange(5.0),
    "numpy of Fortran": lambda: np.arange(6, dtype=np.int16).reshape(2, 3).T,
    "numpy of 0 dimensions": lambda: np.array(1.5, dtype=np.float16),
    "numpy empty": lambda: np.empty((0, 3), dtype=np.complex64),
    "numpy of texts": lambda: np.array(["a", "bcd"]),
    "numpy of bytes": lambda: np.array([b"a", b"bcd"]),
    "numpy bool": lambda: np.array([True, False]),
    "numpy number": lambda: np.float32(3.5),
    "numpy integer": lambda: np.int64(2**63 - 1),
    "numpy true": lambda: np.bool_(True),
    "numpy text": lambda: np.str_("abc"),
    "numpy's random state": lambda: np.random.RandomState(3).get_state(legacy=True),
    "numpy's dtype": lambda: np.dtype(">f4"),
    "numpy in a tuple": lambda: ({"a": np.arange(3)}, [np.int8(1)]),
}
"""What comes back without running code."""


def same(found: Any, expected: Any) -> bool:
    """Whether a value is what was saved, types included."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        return (found.dtype, found.shape, bits_of(found)) == (
            expected.dtype,
            expected.shape,
            bits_of(expected),
        )
    if isinstance(expected, np.ndarray | np.generic):
        return (found.dtype, found.shape, found.tobytes()) == (
            expected.dtype,
            expected.shape,
            expected.tobytes(),
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)
