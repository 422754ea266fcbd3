"""What stands before every call of both services: the token, the allowed methods, and errors turned into status."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import grpc
import pyarrow.flight as fl

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.wire.status import REFUSED_CALLER, encode_error, status_code

from .admission import Admission

UNEXPECTED: Final = "the server met an unexpected error; its log says more"
_LOG = logging.getLogger(__name__)

CONTROL: Final = "/torchcache.v1.Control/"
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
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


class Token:
    """The secret that every call must carry as `authorization: Bearer <token>`. Never shown."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def __repr__(self) -> str:
        return "Token(...)"

    def matches(self, values: Sequence[str | bytes]) -> bool:
        """Whether `values`, the headers of that name, are the token, once. Takes the same time for any value."""
        if len(values) != 1:
            return False
        value = values[0]
        return hmac.compare_digest(value.encode() if isinstance(value, str) else value, self._expected)


class ControlInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Refuses calls without the token and methods not in `methods`; turns errors of the others into status."""

    def __init__(self, token: Token, admission: Admission, methods: frozenset[str]) -> None:
        self._token = token
        self._admission = admission
        self._methods = methods

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        given = [
            value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"
        ]
        if not self._token.matches(given):
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, encode_error(ConfigurationError(REFUSED_CALLER)))
        handler = continuation(handler_call_details) if method in self._methods else None
        if handler is None or handler.unary_unary is None:
            return _refusal(grpc.StatusCode.UNIMPLEMENTED, "")
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self, method: str, behaviour: Callable[[Any, grpc.ServicerContext], Any]
    ) -> Callable[[Any, grpc.ServicerContext], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                with nullcontext() if method in ALWAYS else self._admission.call():
                    return behaviour(request, context)
            except TorchCacheError as error:
                context.abort(status_code(error), encode_error(error))
            except Exception:  # noqa: BLE001 - logged, and told without its text
                _LOG.exception("%s failed unexpectedly", method)
                context.abort(grpc.StatusCode.INTERNAL, encode_error(TorchCacheError(UNEXPECTED)))

        return call


def _refusal(code: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler[Any, Any]:
    def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(code, details)

    return grpc.unary_unary_rpc_method_handler(refuse)


class DataAuthentication(fl.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """Refuses Flight calls without the token, and every method but do_get and do_put."""

    def __init__(self, token: Token) -> None:
        super().__init__()
        self._token = token

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Raises the Flight error of a refused call; needs no middleware object for the others."""
        if not self._token.matches(headers.get("authorization", ())):
            text = encode_error(ConfigurationError(REFUSED_CALLER))
            raise fl.FlightUnauthenticatedError(text, text.encode())
        if info.method not in (fl.FlightMethod.DO_GET, fl.FlightMethod.DO_PUT):
            text = encode_error(ConfigurationError("the server knows no Flight call but do_get and do_put"))
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
