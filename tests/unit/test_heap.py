"""Memory that messages land in is used again. In processes of their own: malloc learns for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from torchcache.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def batch():  # 16 messages of 2 MiB that are held together
    blocks = [libc.malloc(2 << 20) for _ in range(16)]
    for block in blocks:
        ctypes.memset(block, 1, 2 << 20)
    for block in blocks:
        libc.free(block)
batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_what_a_batch_freed_serves_the_next() -> None:
    pages = 10 * 16 * (2 << 20) // 4096
    assert faults("keep") < pages / 100
    assert faults("leave") > pages / 4, "malloc does so by itself now: heap.py isn't needed any more"
