"""Who may call what: the one table of both ports. A method that isn't in it is refused."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from torchcache.errors import ConfigurationError
from torchcache.tokens import Scope, ScopedToken

CONTROL: Final = "/torchcache.v1.Control/"
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
FLIGHT: Final = "flight:"
"""What stands before the name of a call of the data port, as pyarrow's FlightMethod has it."""

_READS: Final = (
    *("GetInfo", "GetStatus", "ReportUse", "TellOrder", "StageAhead", "ForgetOrder", "Stage", "GetResidency"),
    *("ListObjects", "ListFolder", "StatObject", "GetSave", "ListSaves", "HoldSave"),
)
_WRITES: Final = (
    *("PublishObject", "DeleteObject", "PrepareWrite", "CommitWrite", "AbandonWrite"),
    *("ReserveSave", "BorrowFiles", "ReturnFiles", "RenewSave", "CommitSave", "AbandonSave", "DeleteSave"),
    *("PrepareCopy", "ConfirmCopy", "DropCopy"),
)
_CHANGES: Final = ("SetPolicy", "Evict", "SetCredentials", "Drain")

NEEDED: Final[Mapping[str, Scope]] = MappingProxyType(
    {HEALTH_CHECK: Scope.READ, f"{FLIGHT}DO_GET": Scope.READ, f"{FLIGHT}DO_PUT": Scope.WRITE}
    | {CONTROL + name: Scope.READ for name in _READS}
    | {CONTROL + name: Scope.WRITE for name in _WRITES}
    | {CONTROL + name: Scope.ADMIN for name in _CHANGES}
)
"""The scope that each method needs. To fill the pool from storage is reading: any read of what is missing does."""


class Tokens:
    """The secrets of which every call must carry one, as `authorization: Bearer <token>`. Never shown, nor held."""

    def __init__(self, tokens: Sequence[ScopedToken]) -> None:
        self._expected = [(_digest(f"Bearer {token.secret}".encode()), token.scope) for token in tokens]

    def __repr__(self) -> str:
        return "Tokens(...)"

    def scope_of(self, values: Sequence[str | bytes]) -> Scope | None:
        """What the headers of that name allow; None unless there is just one, and one of the tokens.

        Takes the same time whichever token it is, and however much of one is right.
        """
        if len(values) != 1:
            return None
        value = values[0]
        given = _digest(value.encode() if isinstance(value, str) else value)
        found = 0
        for expected, scope in self._expected:
            found |= hmac.compare_digest(given, expected) * scope
        return Scope(found) if found else None


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def denied(needed: Scope, given: Scope) -> ConfigurationError:
    """The error of a call that needs more than its token allows."""
    return ConfigurationError(
        f"this call needs a token of scope {needed}, and the one given has scope {given}: use another, or ask who runs "
        f"the servers for one (torchcache keygen --scope {needed} makes them)"
    )
