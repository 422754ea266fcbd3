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

GIVEN_BACK = """
import ctypes, re, sys, threading
from torchcache.heap import give_back_freed_memory, keep_freed_memory, share_heaps
keep_freed_memory()
share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def taken():  # KiB
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])
freed, over = threading.Barrier(9), threading.Event()
def work():  # 8 MiB, and behind them one block that stays, or the end of the heap
    blocks = [libc.malloc(64 << 10) for _ in range(128)]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    if STAYS:
        libc.malloc(5000)
    for block in blocks:
        libc.free(block)
    freed.wait()
    over.wait()
before = taken()
for _ in range(8):
    threading.Thread(target=work).start()
freed.wait()
if sys.argv[1] == "give":
    give_back_freed_memory()
print(taken() - before)
over.set()
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


@glibc
@pytest.mark.parametrize("stays", [True, False], ids=["amid the heaps", "at their ends"])
def test_what_was_freed_is_given_back(stays: bool) -> None:
    """I5."""
    program = f"STAYS = {stays}{GIVEN_BACK}"
    assert number(program, "give") < 2 * 1024
    assert number(program, "keep") > 24 * 1024, "malloc does so by itself now"
