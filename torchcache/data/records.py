"""Namedtuples and dataclasses in stored samples.

A record names its class as "module:qualname". Reading one runs no code of that class and imports nothing: the class
must be imported already, be of the kind stored, and have the same fields.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeGuard

from torchcache.errors import ConfigurationError, IntegrityError

# A spawned worker knows the user's script as __mp_main__, and as __main__ too; its parent only as __main__.
_MAIN = {"__mp_main__": "__main__"}

_CONTAINERS = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex)


def is_namedtuple(value: object) -> TypeGuard[Any]:
    """Whether `value` is an instance of a class made by collections.namedtuple or typing.NamedTuple."""
    return isinstance(value, tuple) and _namedtuple_fields(type(value)) is not None


def reference(kind: type) -> str:
    """The name a class is stored under."""
    return f"{_MAIN.get(kind.__module__, kind.__module__)}:{kind.__qualname__}"


def problem(value: object, fields: dict[str, Any]) -> str | None:
    """Why `value`, a namedtuple or dataclass with `fields`, can't be stored; None if it can."""
    kind = type(value)
    if _find(reference(kind)) is not kind:
        return "its class can't be found by name; define it at the top level of a module"
    if not is_namedtuple(value) and isinstance(value, _CONTAINERS):
        return "its class is a container besides its fields, whose content would be lost"
    if isinstance(value, tuple) and len(value) != len(fields):
        return f"it has {len(value)} items for {len(fields)} fields"
    extra = sorted(set(getattr(value, "__dict__", ())) - set(fields))
    if extra:
        return f"it has attributes besides its fields, which would be lost: {', '.join(extra)}"
    return None


def restore_namedtuple(reference: str, fields: dict[str, Any]) -> Any:
    """An instance with the values of `fields`. Raises ConfigurationError if the class isn't there or differs."""
    kind = _resolve(reference)
    _check_fields(reference, _namedtuple_fields(kind), fields, "namedtuple")
    return tuple.__new__(kind, fields.values())


def restore_dataclass(reference: str, fields: dict[str, Any]) -> Any:
    """An instance with the values of `fields`, without running `__init__` or `__post_init__`; raises as above."""
    kind = _resolve(reference)
    plain = dataclasses.is_dataclass(kind) and not issubclass(kind, _CONTAINERS)
    names = tuple(f.name for f in dataclasses.fields(kind)) if plain else None
    _check_fields(reference, names, fields, "dataclass")
    value: Any = object.__new__(kind)
    for name, field in fields.items():
        object.__setattr__(value, name, field)
    return value


def _namedtuple_fields(kind: type) -> tuple[str, ...] | None:
    fields = getattr(kind, "_fields", None)
    named = issubclass(kind, tuple) and isinstance(fields, tuple) and all(isinstance(f, str) for f in fields)
    return fields if named else None


def _find(reference: str) -> type | None:
    """The class of that name if it is imported. Looks into `__dict__`s only: a module's `__getattr__` may import."""
    module, _, qualname = reference.partition(":")
    found: object = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found if isinstance(found, type) else None


def _resolve(reference: str) -> type:
    module, separator, qualname = reference.partition(":")
    if not separator:
        raise IntegrityError("a stored sample names a class in an unknown way")
    kind = _find(reference)
    if kind is None:
        state = f"has no class {qualname}" if module in sys.modules else "is not imported in this process"
        raise ConfigurationError(
            f"a stored sample is a {qualname} of module {module}, which {state}: import {module} before reading, "
            "pass encode= and decode=, or give the dataset another version="
        )
    return kind


def _check_fields(reference: str, now: tuple[str, ...] | None, stored: dict[str, Any], what: str) -> None:
    name = reference.replace(":", ".")
    if now is None:
        raise ConfigurationError(
            f"a stored sample is a {what} {name}, but {name} is no {what} now: give the dataset another version="
        )
    if now != tuple(stored):
        raise ConfigurationError(
            f"a stored sample is a {name} with the fields ({', '.join(stored)}), which now has "
            f"({', '.join(now)}): give the dataset another version="
        )
