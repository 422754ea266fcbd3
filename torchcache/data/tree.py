"""The tree of a sample: nested Python values around its tensors and arrays, as tagged nodes.

======  ===================  ==================================================
tag     value                what follows the tag
======  ===================  ==================================================
N T F   None, True, False    nothing
i       int                  i64
I       int of more bits     length, two's complement
f c     float, complex       f64; two f64
s b     str, bytes           length, bytes (UTF-8, lone surrogates kept)
l u     list, tuple          count, nodes
d       dict                 count, pairs of nodes: key, value
r a     namedtuple,          str "module:qualname", count, pairs: str name, node
        dataclass
t       tensor               str dtype, count, u64 a dimension; bytes in a leaf
n       numpy array          node: dtype; count, u64 a dimension; bytes in a leaf
g       numpy scalar         node: dtype; length, bytes
======  ===================  ==================================================

Lengths and counts are u64. A reader trusts none of them: each is checked against the bytes that are left before
anything is made of it, so that memory stays in proportion to the record.
"""

from __future__ import annotations

import struct
from typing import Final

MAX_DEPTH: Final = 100

U64: Final = struct.Struct("<Q")
I64: Final = struct.Struct("<q")
F64: Final = struct.Struct("<d")
C128: Final = struct.Struct("<dd")

_KEYS: Final = (str, int, float, bool, bytes, type(None))


def is_key(key: object) -> bool:
    """Whether `key` may be a dict's: a plain scalar, or a tuple of such."""
    return all(map(is_key, key)) if type(key) is tuple else type(key) in _KEYS
