"""Frames around tensors' own memory are torch.save's, for every dtype and shape."""

from __future__ import annotations

import io
import resource

import pytest
import torch

from torchcache.checkpoint.frame import bytes_of, frame, has_row_major_bytes, row_major
from torchcache.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    memory = bytes_of(tensor)
    memory[:] = bytes(i * 37 % 2 for i in range(len(memory)))
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0, 4), (2, 3, 4, 5)], ids=str)
def test_torch_loads_a_framed_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_bits(shape, dtype)
    around = frame(dtype, shape)
    assert around is not None
    blob = around.head + bytes(bytes_of(tensor)) + around.tail
    loaded = torch.load(io.BytesIO(blob), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape
    assert bytes(bytes_of(loaded)) == bytes(bytes_of(tensor))
    real = io.BytesIO()
    torch.save(tensor, real)
    assert len(blob) == len(real.getvalue())


def test_a_payload_starts_where_torch_aligns_it() -> None:
    around = frame(torch.bfloat16, (1024, 1024))
    assert around is not None and len(around.head) % 64 == 0


def test_a_frame_costs_no_memory_of_the_tensors_size() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    around = frame(torch.uint8, (3 << 30,))
    assert around is not None
    assert len(around.head) + len(around.tail) < 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_contiguous_memory_is_taken_as_it_is() -> None:
    storage = torch.arange(100, dtype=torch.int32)
    view = storage[10:20]
    taken = row_major(torch.nn.Parameter(view, requires_grad=False), name="w")
    assert taken.data_ptr() == view.data_ptr()
    assert bytes(bytes_of(taken)) == view.numpy().tobytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.tensor(1.5).expand(3, 2),
    ],
)
def test_what_is_not_row_major_is_made_so(tensor: torch.Tensor) -> None:
    made = row_major(tensor, name="w")
    assert bytes(bytes_of(made)) == tensor.resolve_conj().resolve_neg().numpy().tobytes()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_more_than_their_elements_are_left_to_torch() -> None:
    class Mine(torch.Tensor):
        pass

    assert has_row_major_bytes(torch.nn.Parameter(torch.ones(2)))
    assert not has_row_major_bytes(torch.eye(2).to_sparse())
    assert not has_row_major_bytes(torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8))
    assert not has_row_major_bytes(torch.ones(2).as_subclass(Mine))


def test_a_meta_tensor_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"'layer\.w' is on the meta device"):
        row_major(torch.empty(2, device="meta"), name="layer.w")
