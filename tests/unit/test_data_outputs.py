"""What CachedDataset.from_files hands out: bytes, views, arrays and tensors, and the memory these lie in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import BufferPool, CachedDataset
from torchcache.data import outputs as module
from torchcache.data.outputs import Landing
from torchcache.errors import ConfigurationError, ServerUnavailable

__all__ = ["pool"]

URI = "s3://bucket/data"
SIZES = [100, 0, 100, 33, 5000, 1, 0, 64, 65, 4096]
PAYLOADS = [random.Random(i).randbytes(size) for i, size in enumerate(SIZES)]
ORDER = [4, 0, 0, 9, 1, 6, 1, 3, 2, 5, 7, 8, 4]


def filled(pool: SamplePool, payloads: list[bytes] = PAYLOADS) -> SamplePool:
    for i, payload in enumerate(payloads):
        pool.put(f"{URI}/{i:04d}", payload)
    return pool


def from_files(pool: SamplePool, **arguments: Any) -> CachedDataset:
    return CachedDataset.from_files(URI, pool=pool, **arguments)  # type: ignore[arg-type]


def as_bytes(sample: Any) -> bytes:
    return sample.numpy().tobytes() if isinstance(sample, torch.Tensor) else bytes(sample)


@pytest.mark.parametrize("output", ["bytes", "view", "numpy", "tensor"])
def test_every_output_is_the_bytes(pool: SamplePool, output: str) -> None:
    dataset = from_files(filled(pool), output=output)
    samples = dataset.__getitems__(ORDER)
    assert [as_bytes(sample) for sample in samples] == [PAYLOADS[i] for i in ORDER]
    assert as_bytes(dataset[-1]) == PAYLOADS[-1]
    assert dataset.__getitems__([]) == []
    assert [len(read) for read in pool.reads] == [len(ORDER), 1]


@pytest.mark.parametrize(("output", "kind"), [("bytes", bytes), ("view", memoryview), ("numpy", np.ndarray)])
def test_outputs_have_their_types(pool: SamplePool, output: str, kind: type) -> None:
    samples = from_files(filled(pool), output=output).__getitems__(ORDER)
    assert {type(sample) for sample in samples} == {kind}


def test_views_are_read_only_and_no_copies(pool: SamplePool) -> None:
    sample = from_files(filled(pool), output="view")[4]
    assert sample.readonly
    assert sample.obj is pool.objects["s3", "bucket/data/0004"]


@pytest.mark.parametrize("output", ["numpy", "tensor"])
@pytest.mark.parametrize("together", [module.TOGETHER_BYTES, 0])
def test_samples_in_buffers_are_the_callers_own(
    pool: SamplePool, output: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write into one changes no other, not even the same object's in the same batch."""
    monkeypatch.setattr(module, "TOGETHER_BYTES", together)
    samples = from_files(filled(pool), output=output).__getitems__(ORDER)
    for number, sample in enumerate(samples):
        sample[...] = number
    assert all((sample == number).all() for number, sample in enumerate(samples))
    assert {str(sample.dtype).removeprefix("torch.") for sample in samples} == {"uint8"}


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.sampled_from([0, 10**9]))
@settings(deadline=None)
def test_landings_do_not_overlap(sizes: list[int], together: int) -> None:
    before, module.TOGETHER_BYTES = module.TOGETHER_BYTES, together  # type: ignore[misc]
    try:
        landing = Landing(sizes, BufferPool("1MiB"))
    finally:
        module.TOGETHER_BYTES = before  # type: ignore[misc]
    targets = landing.targets()
    assert [len(target) for target in targets] == sizes
    for number, target in enumerate(targets):
        target[:] = bytes([number]) * len(target)
    for output in ("numpy", "tensor"):
        samples = landing.samples(output)  # type: ignore[arg-type]
        assert [as_bytes(s) for s in samples] == [bytes([n]) * size for n, size in enumerate(sizes)]


def test_samples_of_one_size_lie_in_one_buffer_end_to_end(pool: SamplePool) -> None:
    payloads = [random.Random(i).randbytes(1000) for i in range(8)]
    samples = from_files(filled(pool, payloads), output="tensor").__getitems__(range(8))
    assert len({sample.untyped_storage().data_ptr() for sample in samples}) == 1
    assert [sample.storage_offset() for sample in samples] == [1000 * i for i in range(8)]


def test_samples_of_other_sizes_are_aligned(pool: SamplePool) -> None:
    samples = from_files(filled(pool), output="tensor").__getitems__(ORDER)
    assert {sample.data_ptr() % 64 for sample in samples if len(sample)} == {0}


def test_buffers_go_back_with_their_samples(pool: SamplePool) -> None:
    buffers = BufferPool("1MiB")
    dataset = from_files(filled(pool), output="tensor", buffers=buffers)
    samples = dataset.__getitems__(ORDER)
    lent = buffers.lent_bytes
    assert lent > 0
    kept = samples[3].numpy()[5:]
    del samples
    assert buffers.lent_bytes == lent
    assert kept.tobytes() == PAYLOADS[ORDER[3]][5:]
    del kept
    assert (buffers.lent_bytes, buffers.free_bytes) == (0, lent)


def test_one_failure_is_raised_and_keeps_no_buffer(pool: SamplePool) -> None:
    buffers = BufferPool("1MiB")
    dataset = from_files(filled(pool), output="tensor", buffers=buffers)
    pool.errors[f"{URI}/0003"] = ServerUnavailable("away", object="three")
    pool.errors[f"{URI}/0007"] = ServerUnavailable("away", object="seven")
    with pytest.raises(ServerUnavailable, match="three"):
        dataset.__getitems__(ORDER)
    pool.errors.clear()
    assert buffers.lent_bytes == 0
    assert as_bytes(dataset[4]) == PAYLOADS[4]


def test_a_transform_gets_the_output(pool: SamplePool) -> None:
    def transform(sample: torch.Tensor) -> float:
        return sample.float().sum().item()

    dataset = from_files(filled(pool), output="tensor", transform=transform)
    assert dataset[4] == float(sum(PAYLOADS[4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "jpeg"}, "output='jpeg' is none of 'bytes', 'view', 'numpy', 'tensor'"),
        ({"output": "view", "decode": bytes}, "give one of them"),
        ({"buffers": BufferPool()}, "not with 'bytes'"),
        ({"output": "view", "buffers": BufferPool()}, "not with 'view'"),
    ],
)
def test_arguments_that_do_not_go_together(pool: SamplePool, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_files(filled(pool), **arguments)
