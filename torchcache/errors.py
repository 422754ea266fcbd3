"""Every error torchcache raises, split by who acts next.

`TransientError` and its children are all that retry looks at. Everything else is final for the call that met it: the
caller, or the user, has to change something first. Errors pickle, because DCP gathers them across ranks, and name the
object and the server they speak of where there is one.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Self

__all__ = [
    "AlreadyExists",
    "CheckpointError",
    "ConfigurationError",
    "DeadlineExceeded",
    "InUse",
    "IntegrityError",
    "NotCommitted",
    "NotResident",
    "ObjectChanged",
    "ObjectNotFound",
    "OutOfSpace",
    "Overloaded",
    "ServerUnavailable",
    "TorchCacheError",
    "TransientError",
    "UnsupportedSample",
]


class TorchCacheError(Exception):
    """Root of all errors of torchcache.

    `object` is the URI or key the error speaks of, `server` the address of the server that met it, `request_id` what
    that server's log calls the request. Any may be None.
    """

    def __init__(
        self,
        message: str,
        *,
        object: str | None = None,
        server: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        self.server = server
        self.request_id = request_id

    def __str__(self) -> str:
        where = [f"object {self.object}"] if self.object and self.object not in self.message else []
        where += [f"server {self.server}"] if self.server and self.server not in self.message else []
        where += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.message} ({', '.join(where)})" if where else self.message

    def saying(self, message: str) -> Self:
        """The same error with another message."""
        again = copy(self)
        again.message, again.args = message, (message,)
        return again

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.object, self.server, self.request_id))


def _rebuild(
    kind: type[TorchCacheError],
    message: str,
    object: str | None,
    server: str | None,
    request_id: str | None = None,
    *_: object,
) -> TorchCacheError:
    # Ranks may run different versions: an older one says less, a newer one may say more.
    return kind(message, object=object, server=server, request_id=request_id)


class TransientError(TorchCacheError):
    """The same call may succeed if made again."""


class ServerUnavailable(TransientError):
    """A server, or the under-store behind it, cannot be reached."""


class Overloaded(TransientError):
    """A server refused because it is at one of its bounds.

    `retry_after_s` is how many seconds it takes, by the server's guess, until asking again may help; None: no guess.
    """

    def __init__(
        self,
        message: str,
        *,
        object: str | None = None,
        server: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, object=object, server=server, request_id=request_id)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # As state, and not as an argument: versions without it can read the pickle, and theirs have no state.
        return (*super().__reduce__(), {"retry_after_s": self.retry_after_s})


class DeadlineExceeded(TransientError):
    """The call's deadline passed."""


class ObjectNotFound(TorchCacheError, FileNotFoundError):
    """The under-store has no such object, bucket or folder."""


class NotResident(ObjectNotFound):
    """The pool doesn't hold it, and it was asked not to, or has no under-store to, fetch it."""


class ObjectChanged(TorchCacheError):
    """The under-store holds another version than the one pinned."""


class IntegrityError(TorchCacheError):
    """Bytes whose checksum is wrong, and no good copy was found."""


class ConfigurationError(TorchCacheError, ValueError):
    """A wrong argument, setting, token or credential."""


class UnsupportedSample(TorchCacheError, TypeError):
    """A computed sample holds a value that the typed encoding has no form for."""


class OutOfSpace(TorchCacheError):
    """The store has no room left for data that must be kept."""


class CheckpointError(TorchCacheError):
    """A checkpoint can't be saved or loaded."""


class NotCommitted(CheckpointError):
    """There is no committed checkpoint at this path."""


class InUse(CheckpointError):
    """The checkpoint is being read, so it is not deleted."""


class AlreadyExists(CheckpointError):
    """Another checkpoint, or another writer, holds this path."""
