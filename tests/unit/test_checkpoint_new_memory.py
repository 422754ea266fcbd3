"""Memory for tensors that are received: of huge pages where that pays, and tensors like any other."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from torchcache.checkpoint.host_memory import new_tensor
from torchcache.mappings import HUGE_BYTES, new_memory

HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


def flags_at(address: int) -> list[str]:
    """What the kernel was told of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="a kernel without transparent huge pages")
def test_large_tensors_are_of_huge_pages_and_small_ones_are_not() -> None:
    assert "hg" in flags_at(new_tensor([HUGE_BYTES // 4], torch.float32).data_ptr())
    assert "hg" not in flags_at(new_tensor([1024], torch.float32).data_ptr())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("rows", [0, 3, HUGE_BYTES // 1000 + 1])
def test_it_is_a_tensor_as_torch_makes_it(dtype: torch.dtype, rows: int) -> None:
    made, usual = new_tensor([rows, 1000], dtype), torch.empty([rows, 1000], dtype=dtype)
    assert (made.dtype, made.shape, made.stride()) == (usual.dtype, usual.shape, usual.stride())
    assert made.untyped_storage().nbytes() == usual.untyped_storage().nbytes()
    assert made.is_contiguous() and made.is_leaf and not made.requires_grad


def test_it_trains_is_shared_and_is_saved() -> None:
    linear = torch.nn.Linear(1024, HUGE_BYTES // 4096, bias=False)
    linear.weight = torch.nn.Parameter(new_tensor(linear.weight.shape, torch.float32).fill_(1.0))
    linear(torch.ones(1024)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=1.0).step()
    assert bool((linear.weight == 0.0).all())
    saved = io.BytesIO()
    torch.save(linear.weight.data, saved)
    assert len(saved.getvalue()) < HUGE_BYTES + 10_000
    linear.share_memory()
    assert linear.weight.is_shared() and bool((linear.weight == 0.0).all())


def test_the_memory_goes_with_its_tensor() -> None:
    def taken() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = taken()
    tensor = new_tensor([256 * HUGE_BYTES], torch.uint8)
    assert taken() - before >= 256 * HUGE_BYTES
    part = tensor[:10].clone()
    del tensor
    assert taken() - before < 128 * HUGE_BYTES
    assert part.numel() == 10


def test_after_a_fork_each_side_has_its_own() -> None:
    memory = new_memory(HUGE_BYTES)
    memory[0] = 1
    child = os.fork()
    if not child:
        memory[0] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory[0] == 1
