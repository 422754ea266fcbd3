"""Changes of the source, each of which takes one guarantee away. They are searched, so new calls come by themselves.

Taken out are calls that make something durable or put it in place, in the store and in a POSIX under-store, the seams
of the save's commit, and every comparison with a checksum or an identity; a record's seed loses its nonce, then its
offset.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

SERVER: Final = Path("server", "torchcache_server")
_FORMATS: Final = Path("torchcache", "records.py")  # the store's, shared with clients

_CALLS: Final = ("fsync", "fsync_dir", "rename", "sync", "sync_names", "_sync_names", "_sync_name")
_CALLS_OF_FILES: Final = ("fsync", "link", "rename")
_FILES: Final = "understore/posix"
_CALLS_OF_SAVES: Final = ("sync", "keep", "make_durable", "settle", "_settle", "require_intact")
_SAVES: Final = (
    *("cache/commits.py", "cache/copies.py", "cache/slots.py", "cache/borrowing.py"),
    "service/data.py",
)
_CHECKED_TOO: Final = ("cache/shard_source.py", _FORMATS.name)
_MARKS: Final = (
    "checksum",
    "digest",
    "magic",
    ".identity",
    "chunk_index",
    "nonce",
    "xxh3",
    "_version",
    "file_name",
    "record_name",
    "noted",
    "copy ==",
)
"""What makes a comparison one that guards against wrong bytes, anywhere in it, in whatever case."""

_OFFLINE: Final = ("mending.py",)  # what the doctor does, no server

EQUIVALENT: Final = {
    "store/segment_scan.py:possible_records words == _MAGIC_WORD": "only a faster search: where it stops is checked",
    "store/mending.py:_set_aside without self._disk.fsync_dir(aside)": "the fsync of the folder that the record leaves "
    "makes both halves of the rename durable: no file system loses a file in between",
    "records.py:stated_length magic == RECORD_MAGIC": "it says how much to read, and what is read is checked",
    "store/folder.py:_begin_anew without self._disk.fsync_dir(self.path)": "the identity's fsync of the same folder "
    "follows at once, and while that is missing the store is empty",
}
"""Changes that change nothing anybody could see, and why. They are not made."""


class Mutant(NamedTuple):
    """`name` says where and what, without line numbers. `source` is the whole changed file at `path`."""

    name: str
    path: Path
    source: str
    loses_bytes: bool  # it is about durability, else about recognising what is wrong


class _Change(NamedTuple):
    what: str
    node: ast.expr
    text: str
    loses_bytes: bool


def mutants(root: Path, *, without: Collection[str] = EQUIVALENT) -> list[Mutant]:
    """All of the tree at `root`, in order of their files, but for those of the names `without`."""
    found: list[Mutant] = []
    names: dict[str, int] = {}
    for path in [*sorted((root / SERVER).rglob("*.py")), root / _FORMATS]:
        relative = path.name if path == root / _FORMATS else path.relative_to(root / SERVER).as_posix()
        source = path.read_text()
        for function, change in _changes(relative, ast.parse(source)):
            name = f"{relative}:{function} {change.what}"
            if name in without:
                continue
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name} #{names[name]}"
            mutated = _replaced(source, change.node, change.text)
            found.append(Mutant(name, path.relative_to(root), mutated, change.loses_bytes))
    return found


def _changes(file: str, tree: ast.Module) -> Iterator[tuple[str, _Change]]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in _own_nodes(function):
                for change in _changes_of(file, function, node):
                    yield function.name, change


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The function's nodes but for those of functions in it, which have their own turn."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
            waiting[:0] = ast.iter_child_nodes(node)


def _changes_of(file: str, function: ast.FunctionDef, node: ast.AST) -> Iterator[_Change]:
    in_store = file.startswith("store/")
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if (
            (name in _CALLS and in_store)
            or (name in _CALLS_OF_SAVES and file in _SAVES)
            or (name in _CALLS_OF_FILES and file.startswith(_FILES))
        ):
            yield _Change(f"without {ast.unparse(node.value)}", node.value, "None", True)
    elif isinstance(node, ast.Compare) and (in_store or file in _CHECKED_TOO):
        if isinstance(node.ops[0], ast.Eq | ast.NotEq) and len(node.ops) == 1 and _guards(node):
            result = "False" if isinstance(node.ops[0], ast.NotEq) else "True"
            yield _Change(f"{ast.unparse(node)}", node, result, False)
    elif isinstance(node, ast.Name) and function.name == "_seed_of" and _is_argument(node, function):
        yield _Change(f"without {node.id}", node, "0", False)


def _is_argument(node: ast.Name, function: ast.FunctionDef) -> bool:
    return node.id in [argument.arg for argument in function.args.args]


def _guards(node: ast.Compare) -> bool:
    text = ast.unparse(node).lower()
    return any(mark in text for mark in _MARKS)


def _replaced(source: str, node: ast.expr, text: str) -> str:
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    start = starts[node.lineno - 1] + node.col_offset
    end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
    raw = source.encode()
    return (raw[:start] + text.encode() + raw[end:]).decode()


def durable_sites(root: Path) -> set[tuple[str, str]]:
    """Where a server's store calls fsync, fsync_dir or rename of the disk: (file:function, call)."""
    sites: set[tuple[str, str]] = set()
    for path in sorted((root / SERVER / "store").glob("*.py")):
        if path.name in _OFFLINE:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in _own_nodes(function):
                    if isinstance(node, ast.Call) and (call := _durable_call(node.func)):
                        sites.add((f"store{os.sep}{path.name}:{function.name}", call))
    return sites


def _durable_call(called: ast.expr) -> str:
    receiver, _, call = ast.unparse(called).rpartition(".")
    on_disk = receiver.rpartition(".")[2] in ("disk", "_disk")
    return call if on_disk and call in ("fsync", "fsync_dir", "rename") else ""
