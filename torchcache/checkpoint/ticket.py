"""How the ranks of a save learn its id.

The coordinator draws the id while planning, and the plans take it to the other ranks as their storage_data. With plan
caching, however, a rank whose plan didn't change throws away the plan that arrives and uses that of an earlier save,
storage_data and all. So a ticket also remembers itself where it is unpickled: torch unpickles a rank's plan in the
thread that goes on to call `write_data`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from typing import Any

from torchcache.model import ObjectId
from torchcache.save_names import save_namespace, saved_file

_arrived = threading.local()


@dataclass(frozen=True, slots=True)
class Ticket:
    """One rank's part in one save: `part` is empty, or this rank's own where ranks save without collectives.

    `rank` names the rank's files; `servers` are the ids of those that shall hold them. `base` is path and id of an
    earlier save of which files may be borrowed, if there is one. Ranks may run different versions: what is added comes
    last, and has a default.
    """

    uri: str
    store: str
    path: str
    part: str
    save_id: str
    rank: int
    servers: tuple[str, ...] = ()
    base: tuple[str, str] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        values = (
            self.uri,
            self.store,
            self.path,
            self.part,
            self.save_id,
            self.rank,
            self.servers,
            self.base,
        )
        return (_arrive, values)

    @property
    def namespace(self) -> str:
        """What the save's files are stored under in the pool."""
        return save_namespace(self.store, self.path, self.save_id)

    def file(self, name: str) -> ObjectId:
        """A file of the save, as the pool holds it."""
        return saved_file(self.store, self.path, name, self.save_id)


def _arrive(*values: Any) -> Ticket:
    """From the values of the fields: of a coordinator of an older version some fewer, of a newer one some more."""
    ticket = Ticket(*values[: len(fields(Ticket))])
    _arrived.ticket = ticket
    return ticket


def forget_arrived() -> None:
    """Before planning: what arrived in this thread belongs to an earlier save."""
    _arrived.ticket = None


def take_arrived(planned: object) -> Ticket | None:
    """The ticket that arrived in this thread since `forget_arrived`, else the one in the plan (`planned`)."""
    ticket = getattr(_arrived, "ticket", None)
    _arrived.ticket = None
    if ticket is not None:
        return ticket  # type: ignore[no-any-return]
    return planned if isinstance(planned, Ticket) else None
