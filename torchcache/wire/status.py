"""Errors <-> wire, in one table.

On gRPC an error is a status code whose details are `encode_error`'s text. In Flight batches and in replies that carry
one error an item it is that text alone. Where a foreign peer or gRPC itself fails, only the status code speaks.
"""

from __future__ import annotations

import json
from typing import Final

import grpc

from torchcache import errors
from torchcache.errors import Overloaded, TorchCacheError
from torchcache.wire.request_ids import is_request_id

# The first row of a status code is what a bare status of that code becomes. More than one error may share a code; the
# name in the text tells them apart.
_TABLE: Final[tuple[tuple[type[TorchCacheError], grpc.StatusCode], ...]] = (
    (errors.ServerUnavailable, grpc.StatusCode.UNAVAILABLE),
    # By a server that ends: a client never cancels its calls.
    (errors.ServerUnavailable, grpc.StatusCode.CANCELLED),
    (errors.TransientError, grpc.StatusCode.UNAVAILABLE),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.OutOfSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.ObjectNotFound, grpc.StatusCode.NOT_FOUND),
    (errors.NotResident, grpc.StatusCode.NOT_FOUND),
    (errors.NotCommitted, grpc.StatusCode.NOT_FOUND),
    (errors.ObjectChanged, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IntegrityError, grpc.StatusCode.DATA_LOSS),
    (errors.ConfigurationError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConfigurationError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.ConfigurationError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.ConfigurationError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.UnsupportedSample, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.CheckpointError, grpc.StatusCode.ABORTED),
    (errors.InUse, grpc.StatusCode.ABORTED),
    (TorchCacheError, grpc.StatusCode.INTERNAL),
)

REFUSED_CALLER: Final = (
    "the server refused the token: pass token=, or let TORCHCACHE_TOKEN_FILE name the server's token file"
)

_BY_NAME: Final = {kind.__name__: kind for kind, _ in _TABLE}
_FIRST_OF_CODE: Final = {code: kind for kind, code in reversed(_TABLE)}
_CODE_OF_KIND: Final = {kind: code for kind, code in reversed(_TABLE)}
_DEFAULT_TEXT: Final = {
    grpc.StatusCode.UNAUTHENTICATED: REFUSED_CALLER,
    grpc.StatusCode.UNIMPLEMENTED: "the server doesn't know this call: are client and server of the same version?",
}


MAX_ERROR_CHARACTERS: Final = 4096
"""Of an encoded error: gRPC sends it as a header, and a client takes no more than 8 KiB of them for an answer."""


RETRY_AFTER_S: Final = 0.25
"""What is told with an `Overloaded` that names no time of its own."""

MOST_RETRY_AFTER_S: Final = 60.0
"""Whatever a server says: it may be wrong, or lie."""


def encode_error(error: TorchCacheError, *, request_id: str | None = None) -> str:
    """One line of JSON; `decode_error` gives an equal error of the same class back, its middle left out if it is long.

    Every `Overloaded` gets a hint when to come again: RETRY_AFTER_S, if it has none of its own. `request_id` is for an
    error among others in a reply. At most `MAX_ERROR_CHARACTERS`, all ASCII.
    """
    fields: dict[str, str | float] = {"error": type(error).__name__, "message": error.message}
    if error.object:
        fields["object"] = error.object
    if error.server:
        fields["server"] = error.server
    if request_id := error.request_id or request_id:
        fields["request"] = request_id
    if isinstance(error, Overloaded):
        hint_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        fields["retry_after_s"] = round(hint_s, 3)
    text = json.dumps(fields)
    for characters in (600, 150):  # one may take six, as \uXXXX
        if len(text) <= MAX_ERROR_CHARACTERS:
            break
        text = json.dumps({name: _shortened(value, characters) for name, value in fields.items()})
    return text


def _shortened(text: str | float, characters: int) -> str | float:
    if not isinstance(text, str):
        return text
    half = characters // 2 - 2
    return text if len(text) <= characters else f"{text[:half]}...{text[-half:]}"


def decode_error(text: str, *, server: str | None = None) -> TorchCacheError:
    """The error behind `encode_error`'s text. Text that isn't ours becomes a plain `TorchCacheError`."""
    try:
        fields = json.loads(text)
        kind = _BY_NAME.get(fields["error"], TorchCacheError)
        said = fields.get("request")
        error = kind(
            str(fields["message"]),
            object=fields.get("object"),
            server=fields.get("server") or server,
            request_id=said if isinstance(said, str) and is_request_id(said) else None,
        )
        if isinstance(error, Overloaded):
            error.retry_after_s = _seconds(fields.get("retry_after_s"))
        return error
    except (ValueError, KeyError, TypeError, AttributeError):
        return TorchCacheError(text, server=server)


def _seconds(told: object) -> float | None:
    """A hint of at most MOST_RETRY_AFTER_S; None if it is none."""
    if isinstance(told, bool) or not isinstance(told, int | float) or not told >= 0:
        return None
    return min(float(told), MOST_RETRY_AFTER_S)


def status_code(error: TorchCacheError) -> grpc.StatusCode:
    """The gRPC status code an error travels under."""
    for kind in type(error).__mro__:
        if kind in _CODE_OF_KIND:
            return _CODE_OF_KIND[kind]
    return grpc.StatusCode.INTERNAL


def error_from_status(
    code: grpc.StatusCode, details: str | None, *, server: str | None = None, request_id: str | None = None
) -> TorchCacheError:
    """The error a gRPC status stands for: ours if `details` carries one, else the first row of its code."""
    if details and details.startswith("{"):
        found = decode_error(details, server=server)
        found.request_id = request_id or found.request_id
        return found
    kind = _FIRST_OF_CODE.get(code, TorchCacheError)
    text = _DEFAULT_TEXT.get(code) or f"{code.name.lower().replace('_', ' ')}: {details or 'no details'}"
    error = kind(text, server=server, request_id=request_id)
    if isinstance(error, Overloaded):  # gRPC's own refusal, which can't say
        error.retry_after_s = RETRY_AFTER_S
    return error


_CODE_OF_FLIGHT: Final = {
    "FlightUnavailableError": grpc.StatusCode.UNAVAILABLE,
    "FlightTimedOutError": grpc.StatusCode.DEADLINE_EXCEEDED,
    "FlightCancelledError": grpc.StatusCode.CANCELLED,
    "FlightUnauthenticatedError": grpc.StatusCode.UNAUTHENTICATED,
    "FlightUnauthorizedError": grpc.StatusCode.PERMISSION_DENIED,
    "ArrowNotImplementedError": grpc.StatusCode.UNIMPLEMENTED,
}


def error_from_flight(error: Exception, *, server: str | None = None) -> TorchCacheError:
    """The error behind what pyarrow's Flight client raised.

    Our server sends `encode_error`'s text twice: as the message, for clients in other languages, and as `extra_info`,
    because pyarrow's client wraps the message ("<message>. Detail: <kind>. gRPC client debug context: ..."). Where
    gRPC or Flight itself failed there is no extra_info, and the exception's class speaks.
    """
    extra = getattr(error, "extra_info", None)
    if extra:
        return decode_error(bytes(extra).decode(errors="replace"), server=server)
    code = _CODE_OF_FLIGHT.get(type(error).__name__, grpc.StatusCode.INTERNAL)
    return error_from_status(code, str(error).partition(". gRPC client debug context")[0], server=server)
