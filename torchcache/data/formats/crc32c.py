"""CRC-32C (Castagnoli, RFC 3720 appendix B.4) with numpy: no dependency, some hundred MB/s.

A CRC is linear: what a byte does to it depends on the byte and on how far it is from the end, not on its neighbours. So
the bytes of a block are looked up in a table of their own each, and all the results are XORed; blocks follow on each
other by the operator that appends as many zeros as a block has.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
_BLOCK = 1024
_SLAB = 64 * _BLOCK
"""Looked up at once: what that needs of memory stays in the processor's cache."""

_ONES = 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C of `data`."""
    array = np.frombuffer(data, dtype=np.uint8)
    head = len(array) % _BLOCK
    crc = _bytewise(bytes(array[:head]), _ONES) if head < 64 else _ahead(array[:head], _ONES)
    zeros = _zeros()
    for at in range(head, len(array), _SLAB):
        for part in _parts(array[at : at + _SLAB].reshape(-1, _BLOCK)):
            crc = _append(zeros, crc) ^ part
    return crc ^ _ONES


def _ahead(array: NDArray[np.uint8], crc: int) -> int:
    """The state after fewer bytes than a block, but four or more: a state is as if they were XORed with it."""
    begun = array.copy()
    begun[:4] ^= np.frombuffer(crc.to_bytes(4, "little"), dtype=np.uint8)
    index = np.add(begun, _places()[_BLOCK - len(array) :], dtype=np.intp)
    return int(np.bitwise_xor.reduce(_tables().take(index)))


def _parts(blocks: NDArray[np.uint8]) -> list[int]:
    """What each block does to a state of zero."""
    index = np.add(blocks, _places(), dtype=np.intp)
    found: list[int] = np.bitwise_xor.reduce(_tables().take(index), axis=1).tolist()
    return found


@cache
def _places() -> NDArray[np.intp]:
    """Where the table of each place of a block begins."""
    return np.arange(_BLOCK, dtype=np.intp) * 256


def _append(zeros: list[list[int]], crc: int) -> int:
    """The state `crc` behind a block of zeros."""
    a, b, c, d = zeros
    return a[crc & 255] ^ b[crc >> 8 & 255] ^ c[crc >> 16 & 255] ^ d[crc >> 24]


@cache
def _byte_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


def _bytewise(data: bytes, crc: int) -> int:
    table = _byte_table()
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc


@cache
def _tables() -> NDArray[np.uint32]:
    """For place p of a block and byte b, at 256 p + b: what it does to the state at the block's end."""
    step = np.array(_byte_table(), dtype=np.uint32)
    rows = [step]
    for _ in range(_BLOCK - 1):
        last = rows[-1]
        rows.append(step[last & 255] ^ last >> np.uint32(8))
    return np.concatenate(rows[::-1])


@cache
def _zeros() -> list[list[int]]:
    """The operator that appends a block of zeros, as a table for each byte of the state."""
    columns = []
    step = np.array(_byte_table(), dtype=np.uint32)
    for place in range(4):
        states = np.arange(256, dtype=np.uint32) << np.uint32(8 * place)
        for _ in range(_BLOCK):
            states = step[states & 255] ^ states >> np.uint32(8)
        columns.append(states.tolist())
    return columns
