"""Plain Python values as JSON and back, types kept: for what planners note beside a checkpoint."""

from __future__ import annotations

from typing import Any, cast


class NotPlainError(TypeError):
    """A value that `encode_plain` has no form for."""


def encode_plain(value: object) -> Any:
    """`value` as JSON that `decode_plain` turns back into the same: None, bool, int, float, str, list, tuple, dict.

    Tuples are {"tuple": [...]}, dicts {"dict": [[key, value], ...]}. Raises NotPlainError of anything else, subclasses
    included.
    """
    kind = type(value)
    if value is None or kind in {bool, int, float, str}:
        return value
    if kind is list:
        return [encode_plain(v) for v in cast(list[Any], value)]
    if kind is tuple:
        return {"tuple": [encode_plain(v) for v in cast(tuple[Any, ...], value)]}
    if kind is dict:
        pairs = cast(dict[Any, Any], value).items()
        return {"dict": [[encode_plain(k), encode_plain(v)] for k, v in pairs]}
    raise NotPlainError(f"{kind.__module__}.{kind.__qualname__}")


def decode_plain(value: Any) -> Any:
    """The inverse of `encode_plain`. Raises ValueError or TypeError for what it can't have made."""
    if isinstance(value, list):
        return [decode_plain(v) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(decode_plain(v) for v in content)
        if kind != "dict":
            raise ValueError(f"{kind!r} is no kind of value")
        return {decode_plain(k): decode_plain(v) for k, v in content}
    return value
