"""Unusual tensors and values through a real pool; and what can't be saved is refused before anything is written."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from tests.e2e.throwaway import throwaway
from tests.unit.unusual_values import (
    DTYPES,
    KNOWN_DTYPES,
    SPARSE,
    VALUES,
    VIEWS,
    bits_of,
    random_bits,
    same,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # What torch says of its own tensors, the first time that one is made in a process.
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked)"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    root = tmp_path_factory.mktemp("pool")
    with throwaway(tc.LocalPool(root, "500MB"), root) as pool:
        yield pool


class Mine(torch.Tensor):
    """A subclass that nobody allowed."""


def tensors() -> dict[str, torch.Tensor]:
    of_dtypes = {f"of {t}": random_bits(t) for t in DTYPES if str(t) in KNOWN_DTYPES}
    return {**of_dtypes, **{name: make() for name, make in VIEWS.items()}}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_one_state_of_them_all_by_dcp(pool: tc.Pool, tmp_path: Path, compression: str | None) -> None:
    content: dict[str, Any] = {**tensors(), **{f"value {name}": make() for name, make in VALUES.items()}}
    writer = tc.CacheStorageWriter(tmp_path / "saved", pool=pool, compression=compression, durability="store")
    dcp.save(content, storage_writer=writer)
    readers = (tc.CacheStorageReader(tmp_path / "saved", pool=pool), dcp.FileSystemReader(tmp_path / "saved"))
    for reader in readers:
        loaded = {name: _place(value) for name, value in content.items()}
        dcp.load(loaded, storage_reader=reader)
        assert not [name for name in content if not same(_plain(loaded[name]), _plain(content[name]))]


def _place(value: Any) -> Any:
    """For what is loaded; torch knows nothing of a dict that has nothing in it, unless it is there."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    return {} if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    """A tensor as one of no class of its own."""
    return value.detach().resolve_conj().resolve_neg() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("behind", [False, True])
def test_one_state_of_them_all_by_the_manager(pool: tc.Pool, tmp_path: Path, behind: bool) -> None:
    """Into a state that has no place for any of it: the manager makes them, sparse ones dense."""
    values = {
        name: make() for name, make in VALUES.items() if name != "empty dict"
    }  # which torch doesn't save
    content: dict[str, Any] = {
        "values": values,
        "tensors": tensors(),
        "sparse": {n: m() for n, m in SPARSE.items()},
    }
    with tc.CheckpointManager(tmp_path, pool=pool, rng=False) as manager:
        if behind:
            manager.save_async(1, content).result(300)
        else:
            manager.save(1, content)
        loaded: dict[str, Any] = {"values": {}, "tensors": {}, "sparse": {}}
        manager.load(loaded)
    assert loaded["values"].keys() == values.keys()
    assert not [name for name in values if not same(loaded["values"][name], values[name])]
    for name, tensor in content["tensors"].items():
        assert loaded["tensors"][name].dtype == tensor.dtype, name
        assert bits_of(loaded["tensors"][name]) == bits_of(tensor), name
    for name, tensor in content["sparse"].items():
        assert torch.equal(loaded["sparse"][name].to_dense(), tensor.to_dense()), name


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "can't be saved"),
    "mkldnn": (lambda: torch.ones(3, 4).to_mkldnn(), "can't be saved"),
    "not made yet": (torch.nn.parameter.UninitializedParameter, "can't be saved"),
    "of no size": (lambda: torch.empty(4, dtype=torch.bits8), "torch.bits8"),
    "of half a byte": (lambda: torch.empty(4, dtype=torch.int4), "torch.int4"),
    "subclass": (lambda: torch.ones(3).as_subclass(Mine), r"\.Mine.*add_safe_globals"),
    "objects": (lambda: np.array([1, "a"], dtype=object), "numpy.ndarray, can't be loaded safely"),
    "records": (lambda: np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "can't be loaded safely"),
    "class": (lambda: datetime.timedelta(1), "datetime.timedelta"),
    "lambda": (lambda: lambda: 1, "can't be loaded safely"),
    "function": (lambda: len, "builtins.len"),
    "lock": (threading.Lock, "can't be loaded safely"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_come_back_is_refused_by_name(
    pool: tc.Pool, tmp_path: Path, name: str, behind: bool
) -> None:
    make, message = REFUSED[name]
    manager = tc.CheckpointManager(tmp_path, pool=pool, rng=False)
    state = {"a": {"large": torch.ones(1_000_000), "deep": [1, ({"x": make()},)]}}
    with pytest.raises(tc.CheckpointError, match=rf"(?s)'a\.deep\.1\.0\.x'.*{message}"):
        (manager.save_async if behind else manager.save)(1, state)
    assert manager.list() == []
    assert not list(tmp_path.iterdir())
    manager.save(1, {"a": 1})  # the step is nobody's
