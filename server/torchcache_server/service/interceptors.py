"""What stands before every call of both services: the token and its scope, and errors turned into status."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import grpc
import pyarrow.flight as fl
from google.protobuf.message import DecodeError

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.wire.status import REFUSED_CALLER, encode_error, status_code

from .admission import Admission
from .latencies import Latencies
from .scopes import CONTROL, FLIGHT, HEALTH_CHECK, NEEDED, Tokens, denied

UNEXPECTED: Final = "the server met an unexpected error; its log says more"
_LOG = logging.getLogger(__name__)

ALWAYS: Final = frozenset(
    {HEALTH_CHECK}
    | {
        CONTROL + name
        for name in (
            *("GetInfo", "GetStatus", "GetSave", "ListSaves", "RenewSave", "AbandonSave"),
            *("CommitWrite", "AbandonWrite", "ConfirmCopy", "DropCopy"),
        )
    }
)
"""Methods answered while the server drains too: whoever waits for a save to become durable goes on waiting, and what
was begun may be ended."""


class ControlInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Refuses calls without a token, or of no scope for their method; turns errors of the others into status."""

    def __init__(self, tokens: Tokens, admission: Admission, latencies: Latencies) -> None:
        self._tokens = tokens
        self._admission = admission
        self._latencies = latencies

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        given = [
            value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"
        ]
        scope = self._tokens.scope_of(given)
        if scope is None:
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, encode_error(ConfigurationError(REFUSED_CALLER)))
        needed = NEEDED.get(method)
        handler = continuation(handler_call_details) if needed is not None else None
        if needed is None or handler is None or handler.unary_unary is None:
            return _refusal(grpc.StatusCode.UNIMPLEMENTED, "")
        if scope < needed:
            return _refusal(grpc.StatusCode.PERMISSION_DENIED, encode_error(denied(needed, scope)))
        # What the request's bytes are is found out in the call: gRPC would log what isn't protobuf, and say INTERNAL.
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self,
        method: str,
        behaviour: Callable[[Any, grpc.ServicerContext], Any],
        parse: Callable[[bytes], Any] | None,
    ) -> Callable[[bytes, grpc.ServicerContext], Any]:
        kind = method.rpartition("/")[2]

        def call(request: bytes, context: grpc.ServicerContext) -> Any:
            try:
                with (
                    self._latencies.timed(kind),
                    nullcontext() if method in ALWAYS else self._admission.call(),
                ):
                    return behaviour(_parsed(request, parse), context)
            except TorchCacheError as error:
                context.abort(status_code(error), encode_error(error))
            except Exception:  # noqa: BLE001 - logged, and told without its text
                _LOG.exception("%s failed unexpectedly", method)
                context.abort(grpc.StatusCode.INTERNAL, encode_error(TorchCacheError(UNEXPECTED)))

        return call


def _parsed(request: bytes, parse: Callable[[bytes], Any] | None) -> Any:
    try:
        return request if parse is None else parse(request)
    except DecodeError:
        raise ConfigurationError(
            "the request is no message of this call: are client and server of the same version?"
        ) from None


def _refusal(code: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler[Any, Any]:
    def refuse(_requests: Any, context: grpc.ServicerContext) -> Any:
        context.abort(code, details)

    # Of a call that streams: a unary one would be refused once its request has come, and a stranger who never sends
    # that would hold one of the calls that may run at once.
    return grpc.stream_unary_rpc_method_handler(refuse)


class DataAuthentication(fl.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """Refuses Flight calls without a token, or of no scope for them, and every method but do_get and do_put."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Raises the Flight error of a refused call; needs no middleware object for the others."""
        scope = self._tokens.scope_of(headers.get("authorization", ()))
        if scope is None:
            text = encode_error(ConfigurationError(REFUSED_CALLER))
            raise fl.FlightUnauthenticatedError(text, text.encode())
        needed = NEEDED.get(FLIGHT + info.method.name)
        if needed is None or scope < needed:
            unknown = ConfigurationError("the server knows no Flight call but do_get and do_put")
            text = encode_error(unknown if needed is None else denied(needed, scope))
            raise fl.FlightUnauthorizedError(text, text.encode())


_FLIGHT_KIND: Final = {
    grpc.StatusCode.UNAVAILABLE: fl.FlightUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: fl.FlightTimedOutError,
    grpc.StatusCode.INTERNAL: fl.FlightInternalError,
}


def flight_error(error: TorchCacheError) -> Exception:
    """The exception that pyarrow's Flight server sends as `error`; see `wire.status.error_from_flight`."""
    text = encode_error(error)
    kind = _FLIGHT_KIND.get(status_code(error), fl.FlightServerError)
    sent: Exception = kind(text, text.encode())
    return sent


@contextmanager
def flight_errors(call: str) -> Iterator[None]:
    """Around a Flight handler: what it raises becomes a Flight error that carries ours."""
    try:
        yield
    except TorchCacheError as error:
        raise flight_error(error) from None
    except (fl.FlightError, GeneratorExit):
        raise
    except Exception:  # noqa: BLE001 - what else comes is logged, and told without its text
        _LOG.exception("%s failed unexpectedly", call)
        raise flight_error(TorchCacheError(UNEXPECTED)) from None
