"""`torchcache status --watch`: the newest checkpoints that the pool holds something of, and how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torchcache.cli.output import Alert, duration_text, size_text
from torchcache.errors import TorchCacheError, TransientError
from torchcache.save_names import split_save_namespace

if TYPE_CHECKING:
    from torchcache.checkpoint.catalog import State
    from torchcache.cli.output import Output
    from torchcache.pool import Pool, SaveInfo, ServerStatus

NEWEST: Final = 10
"""Checkpoints that are shown."""

ASKED_AT_ONCE: Final = 20
"""Checkpoints that are asked about at one look, those that storage doesn't have yet before the others."""

WAIT_S: Final = 1.0
"""How long a look waits for the answers. They may need storage, which may be away: the look after has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentSave:
    """A checkpoint, or with `part` what one rank committed for itself.

    `state`: see `torchcache.checkpoint.catalog.Checkpoint`; "not durable" while nobody has said how far it is. So many
    `servers` hold something of it. `age_s` since it was committed, by this machine's clock; None if it isn't, or that
    isn't known.
    """

    uri: str
    part: str
    state: State | Literal["not durable"]
    bytes: int
    pending_bytes: int
    servers: int
    age_s: float | None
    error: str


@dataclass(slots=True)
class _Held:
    """What the servers' status says of one save."""

    uri: str
    save_id: str
    bytes: int = 0
    servers: int = 0
    is_dirty: bool = False


class RecentSaves:
    """What `of` finds, asked for in a thread of its own: only of what isn't known to be durable yet."""

    def __init__(self, pool: Pool, *, wait_s: float | None = None) -> None:
        self._pool = pool
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._known: dict[str, SaveInfo | None] = {}  # by namespace; None: no server knows of such a save
        self._asking: threading.Thread | None = None

    def of(self, servers: Iterable[ServerStatus]) -> list[RecentSave]:
        """Of what the servers hold, the newest first; what is being saved is newer than all others."""
        held = _held(servers)
        self._ask(held)
        known = dict(self._known)
        found = [
            (save.committed_unix_s if save is not None else 0.0, _recent(one, save))
            for namespace, one in held.items()
            if (save := known.get(namespace)) is not None or namespace not in known or one.is_dirty
        ]
        found.sort(key=lambda pair: (pair[1].state in ("saving", "not durable"), pair[0]), reverse=True)
        return [recent for _, recent in found[:NEWEST]]

    def _ask(self, held: Mapping[str, _Held]) -> None:
        if self._asking is None or not self._asking.is_alive():
            self._known = {name: save for name, save in self._known.items() if name in held}
            unsettled = [name for name in held if not self._is_settled(name, held[name])]
            unsettled.sort(key=lambda name: not held[name].is_dirty)
            asked = {name: held[name] for name in unsettled[:ASKED_AT_ONCE]}
            if not asked:
                return
            self._asking = threading.Thread(
                target=self._ask_about, args=(asked,), name="recent-saves", daemon=True
            )
            self._asking.start()
        self._asking.join(self._wait_s)

    def _is_settled(self, namespace: str, held: _Held) -> bool:
        if namespace not in self._known:
            return False
        save = self._known[namespace]
        return not held.is_dirty if save is None else save.state == "durable"

    def _ask_about(self, asked: Mapping[str, _Held]) -> None:
        for namespace, held in asked.items():
            try:
                saves = self._pool.list_saves(held.uri)
            except TransientError:
                return  # so would the others be; a later look asks again
            except TorchCacheError:
                saves = []
            self._known[namespace] = next((save for save in saves if save.save_id == held.save_id), None)


def _held(servers: Iterable[ServerStatus]) -> dict[str, _Held]:
    """By namespace. Servers that hold it hold the same, but for one that hasn't got all of it yet."""
    found: dict[str, _Held] = {}
    for server in servers:
        roots = {one.name: one.uri for one in server.under_stores}
        for namespace in server.namespaces:
            named = split_save_namespace(namespace.name)
            if named is None:
                continue
            store, path, save_id = named
            root = roots.get(store, store)
            uri = f"{root}{path}" if root.endswith("/") else f"{root}/{path}"
            one = found.setdefault(namespace.name, _Held(uri, save_id))
            one.bytes = max(one.bytes, namespace.bytes)
            one.servers += 1
            one.is_dirty |= namespace.dirty
    return found


def _recent(held: _Held, save: SaveInfo | None) -> RecentSave:
    from torchcache.checkpoint.catalog import state_of

    if save is None:
        return RecentSave(
            uri=held.uri,
            part="",
            state="not durable" if held.is_dirty else "durable",
            bytes=held.bytes,
            pending_bytes=0,
            servers=held.servers,
            age_s=None,
            error="",
        )
    committed = save.committed_unix_s
    return RecentSave(
        uri=held.uri,
        part=save.part,
        state=state_of(save),
        bytes=save.total_bytes or held.bytes,
        pending_bytes=save.pending_bytes,
        servers=held.servers,
        age_s=max(0.0, time.time() - committed) if committed else None,
        error=str(save.error) if save.error else "",
    )


def show_recent_saves(output: Output, saves: Iterable[RecentSave]) -> None:
    """A table, if there are any."""
    rows = [
        (
            f"{save.uri} ({save.part})" if save.part else save.uri,
            Alert(save.state) if save.state == "failed" else save.state,
            size_text(save.bytes),
            size_text(save.pending_bytes) if save.pending_bytes else "-",
            "-" if save.age_s is None else duration_text(save.age_s),
            str(save.servers),
            save.error,
        )
        for save in saves
    ]
    if rows:
        output.table(
            ("newest checkpoints", "state", ">size", ">to upload", ">age", ">servers", "error"), rows
        )
