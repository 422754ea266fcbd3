"""Memory that messages land in is used again. In processes of their own: malloc learns for good."""

from __future__ import annotations

import os
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

THREADS = """
import ctypes, re, sys, tempfile, threading
from torchcache.heap import share_heaps
if sys.argv[1] == "share":
    share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
started = threading.Barrier(16)
def work():  # each has a heap as soon as it takes memory
    libc.malloc(5000)
    started.wait()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.TemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fdopen(file.fileno(), b"w"))
    libc.malloc_info(0, stream)
    libc.fflush(stream)
    file.seek(0)
    print(len(re.findall(rb"<heap nr", file.read())))
"""


def number(program: str, how: str) -> int:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", program, how]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environ)
    return int(ended.stdout)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")


@glibc
def test_what_a_batch_freed_serves_the_next() -> None:
    pages = 10 * 16 * (2 << 20) // 4096
    assert number(PROGRAM, "keep") < pages / 100
    assert number(PROGRAM, "leave") > pages / 4, "malloc does so by itself now: heap.py isn't needed any more"


@glibc
def test_threads_share_a_few_heaps() -> None:
    assert number(THREADS, "share") <= 4
    assert number(THREADS, "leave") > 4, "malloc does so by itself now"
