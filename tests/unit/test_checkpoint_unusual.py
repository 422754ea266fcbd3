"""Unusual tensors and values, saved and loaded: bit by bit what stock's writer and reader make of them, or more."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit.checkpoint_pool import CheckpointPool
from tests.unit.checkpoint_states import KEY, adopt, folder_of, reader, writer
from tests.unit.unusual_values import DTYPES, KNOWN_DTYPES, SPARSE, VALUES, VIEWS, bits_of, random_bits, same
from torchcache.checkpoint import Zstd
from torchcache.checkpoint.safe_loading import load_safely
from torchcache.checkpoint.stager import Stager
from torchcache.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # What torch says of its own tensors, the first time that one is made in a process.
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

WAYS = ("plain", "compressed", "staged", "stock")


@pytest.fixture
def pool() -> CheckpointPool:
    return CheckpointPool()


class Mine(torch.Tensor):
    """A subclass without a mind of its own."""


def save(pool: CheckpointPool, folder: Path, way: str, content: dict[str, Any]) -> None:
    """By one of WAYS; what stock saved lies in `folder`, and in the pool's under-store."""
    if way == "stock":
        dcp.save(content, storage_writer=dcp.FileSystemWriter(folder, sync_files=False))
        adopt(pool, folder)
        return
    compression = Zstd(level=1) if way == "compressed" else None
    staged = Stager().stage(content) if way == "staged" else content
    dcp.save(staged, storage_writer=writer(pool, compression=compression))
    pool.upload(*KEY)
    folder_of(pool, folder)


def load_both(pool: CheckpointPool, folder: Path, ours: Any, stock: Any) -> None:
    """Into `ours` with our reader, into `stock` with stock's."""
    dcp.load(ours, storage_reader=reader(pool))
    dcp.load(stock, storage_reader=dcp.FileSystemReader(folder))


def failure(raised: pytest.ExceptionInfo[dcp.CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


# ---- tensors ----


def test_the_dtypes_are_those_that_there_are() -> None:
    assert set(map(str, DTYPES)) >= KNOWN_DTYPES


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if not str(dtype).startswith("torch.q")], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_a_dtype_comes_back_bit_by_bit_or_is_refused_as_stock_refuses_it(
    pool: CheckpointPool, tmp_path: Path, dtype: torch.dtype, way: str
) -> None:
    content = {str(shape): random_bits(dtype, shape) for shape in ((), (0,), (5, 7), (2, 0, 3))}
    try:
        save(pool, tmp_path / "saved", way, content)
    except dcp.CheckpointException as error:
        assert str(dtype) not in KNOWN_DTYPES, error
        with pytest.raises(dcp.CheckpointException):
            save(CheckpointPool(), tmp_path / "stock", "stock", content)
        assert not pool.writes and not pool.saved and not pool.objects
        return
    ours, stock = ({name: random_bits(dtype, t.shape) for name, t in content.items()} for _ in range(2))
    for target in (*ours.values(), *stock.values()):
        target.untyped_storage().fill_(0)
    load_both(pool, tmp_path / "saved", ours, stock)
    assert same(ours, content)
    assert same(stock, content)


@pytest.mark.parametrize("way", WAYS)
def test_views_of_all_kinds_come_back_bit_by_bit(pool: CheckpointPool, tmp_path: Path, way: str) -> None:
    content = {name: make() for name, make in VIEWS.items()}
    save(pool, tmp_path / "saved", way, content)
    ours, stock = (
        {name: torch.empty(t.shape, dtype=t.dtype) for name, t in content.items()} for _ in range(2)
    )
    load_both(pool, tmp_path / "saved", ours, stock)
    wrong = [name for name, t in content.items() if bits_of(ours[name]) != bits_of(t)]
    assert not wrong
    assert not [name for name, t in content.items() if bits_of(stock[name]) != bits_of(t)]


@pytest.mark.parametrize(
    "name", [name for name in VIEWS if "overlapping" not in name and "expanded" not in name]
)
def test_views_of_all_kinds_are_loaded_into_where_they_are(pool: CheckpointPool, name: str) -> None:
    saved = VIEWS[name]().detach().resolve_conj().resolve_neg().clone()
    dcp.save({"x": saved}, storage_writer=writer(pool))
    target = VIEWS[name]().detach()
    with torch.inference_mode(target.is_inference()):
        target.zero_()
        dcp.load({"x": target}, storage_reader=reader(pool))
    assert bits_of(target) == bits_of(saved)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_one_storage_each_come_back(pool: CheckpointPool, tmp_path: Path, way: str) -> None:
    whole = torch.arange(40.0)
    content = {"whole": whole, "again": whole, "end": whole[30:], "grid": whole.view(8, 5).t()}
    save(pool, tmp_path / "saved", way, content)
    ours, stock = ({name: torch.zeros_like(t) for name, t in content.items()} for _ in range(2))
    load_both(pool, tmp_path / "saved", ours, stock)
    assert same(ours, content)
    assert same(stock, content)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("way", ["plain", "compressed", "staged"])
def test_sparse_tensors_which_stock_refuses_come_back(
    pool: CheckpointPool, tmp_path: Path, name: str, way: str
) -> None:
    made = SPARSE[name]()
    save(pool, tmp_path / "saved", way, {"x": made})
    other = (
        torch.diag(torch.arange(1.0, made.shape[0] + 1), 0)[:, :1].expand(made.shape).clone()
    )  # another pattern
    sparse = torch.sparse_coo_tensor(size=made.shape) if "coo" in name else made.clone()
    if "coo" not in name:
        blocks = (2, 2) if name in ("bsr", "bsc") else None
        sparse = other.to_sparse(layout=made.layout, blocksize=blocks)
    dense = torch.full(made.shape, 7.0)
    dcp.load({"x": sparse}, storage_reader=reader(pool))
    assert sparse.layout is made.layout and sparse._nnz() == made._nnz()
    assert torch.equal(sparse.to_dense(), made.to_dense())
    dcp.load({"x": dense}, storage_reader=reader(pool))
    assert torch.equal(dense, made.to_dense())


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_quantised_tensors_bring_their_scales(
    pool: CheckpointPool, tmp_path: Path, dtype: torch.dtype, way: str
) -> None:
    """Stock's reader puts them into the target's scale, and loses what that can't hold."""

    def made(value: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        each = torch.quantize_per_channel(
            value, torch.full((3,), scale), torch.ones(3, dtype=torch.int64), 0, dtype
        )
        return {"tensor": torch.quantize_per_tensor(value, scale, 1, dtype), "channel": each}

    content = made(torch.arange(12.0).reshape(3, 4), 0.5)
    save(pool, tmp_path / "saved", way, content)
    loaded = made(torch.zeros(3, 4), 8.0)
    dcp.load(loaded, storage_reader=reader(pool))
    for name, tensor in content.items():
        assert torch.equal(loaded[name].int_repr(), tensor.int_repr())
        assert torch.equal(loaded[name].dequantize(), tensor.dequantize())


@pytest.mark.parametrize("target", ["csc", "coo"])
def test_a_target_of_another_kind_is_an_error_that_says_of_which(pool: CheckpointPool, target: str) -> None:
    dcp.save({"x": SPARSE["csr"]()}, storage_writer=writer(pool))
    with pytest.raises(
        dcp.CheckpointException, match=r"'x' is a tensor of .*sparse_csr in the checkpoint"
    ) as raised:
        dcp.load({"x": SPARSE[target]()}, storage_reader=reader(pool))
    assert isinstance(failure(raised), CheckpointError)


@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_comes_back_where_it_is_allowed(pool: CheckpointPool, tmp_path: Path, way: str) -> None:
    made = torch.arange(12.0).reshape(3, 4).t().as_subclass(Mine)
    save(pool, tmp_path / "saved", way, {"x": made})
    target = torch.zeros(4, 3)
    with pytest.raises(dcp.CheckpointException, match=r"'x' refers to .*Mine.*add_safe_globals") as raised:
        dcp.load({"x": target}, storage_reader=reader(pool))
    assert isinstance(failure(raised), CheckpointError)
    with torch.serialization.safe_globals([Mine]):
        dcp.load({"x": target}, storage_reader=reader(pool))
    assert bits_of(target) == bits_of(made.as_subclass(torch.Tensor))  # type: ignore[arg-type]


# ---- other values ----


@pytest.mark.parametrize("way", WAYS)
def test_values_of_all_kinds_come_back(pool: CheckpointPool, tmp_path: Path, way: str) -> None:
    content = {name: make() for name, make in VALUES.items()}
    save(pool, tmp_path / "saved", way, content)
    ours, stock = ({name: {} if value == {} else "nothing" for name, value in _named()} for _ in range(2))
    load_both(pool, tmp_path / "saved", ours, stock)
    assert not [name for name in content if not same(ours[name], content[name])]
    assert not [name for name in content if not same(stock[name], content[name])]


def _named() -> list[tuple[str, Any]]:
    return [(name, None if "numpy" in name else make()) for name, make in VALUES.items()]


class Lies:
    """Pickles as a call of whatever it is given, with whatever arguments, and a state."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return self.made


def _array(dtype: Any, shape: tuple[int, ...], data: Any) -> Lies:
    build, arguments, _ = np.arange(3).__reduce__()  # type: ignore[misc]
    return Lies(build, arguments, (1, shape, dtype, False, data))


def _pointers() -> Lies:
    """Numbers that are said to be objects once they are there: numpy itself would follow them."""
    return Lies(np.dtype, ("i8", False, True), (3, "|", None, None, None, -1, -1, 63))


def _beyond() -> Lies:
    """Eight bytes with a field behind them."""
    state = (3, "|", None, ("a",), {"a": (np.dtype("i8"), 99)}, 8, 1, 0)
    return Lies(np.dtype, ("V8", False, True), state)


@pytest.mark.parametrize(
    "lie",
    [
        _array(np.dtype("i8"), (10**6,), b"\0" * 8),
        _array(np.dtype("i8"), (1,), b"\0" * 7),
        _array(np.dtype("O"), (1,), [print]),
        _array(_beyond(), (1,), b"\0" * 8),
        Lies(np.dtype, ("i8,i8", False, True)),
        Lies(np.float64(1).__reduce__()[0], (np.dtype("f8"), b"\0" * 16)),
        Lies(np.float64(1).__reduce__()[0], (np.dtype("O"), print)),
        Lies(bytes, (1 << 40,)),
        Lies(bytes, ([1, 2],)),
        np.array([1, "a"], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    ],
)  # fmt: skip
def test_what_pretends_to_be_numpys_is_refused(lie: Any) -> None:
    blob = io.BytesIO()
    torch.save(lie, blob)
    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        load_safely(blob.getvalue())


def test_numbers_of_another_byte_order_keep_their_values() -> None:
    """numpy itself turns them round while it unpickles."""
    blob = io.BytesIO()
    torch.save([np.arange(6, dtype=">u4"), np.dtype(">u4").type(7)], blob)
    array, number = load_safely(blob.getvalue())
    assert (array.tolist(), array.dtype.kind, array.itemsize, number) == (list(range(6)), "u", 4, 7)


def test_a_dtype_can_not_say_that_numbers_are_pointers() -> None:
    blob = io.BytesIO()
    torch.save(_array(_pointers(), (1,), b"\1" * 8), blob)
    found = load_safely(blob.getvalue())
    assert found.dtype == np.dtype("i8") and not found.dtype.hasobject
    assert found.tolist() == [0x0101010101010101]


def test_torch_s_own_list_is_left_as_it_was() -> None:
    before = set(torch.serialization.get_safe_globals())
    blob = io.BytesIO()
    torch.save([np.arange(3), b""], blob)
    load_safely(blob.getvalue())
    assert set(torch.serialization.get_safe_globals()) == before
