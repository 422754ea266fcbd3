"""What stands before every call of both services: the token and its scope, and errors turned into status."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import grpc
import pyarrow.flight as fl
from google.protobuf.message import DecodeError

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.tokens import Scope
from torchcache.wire.request_ids import HEADER, received_request_id
from torchcache.wire.status import REFUSED_CALLER, encode_error, status_code

from .admission import Admission
from .latencies import Latencies
from .request_log import Request, RequestLog, serving
from .scopes import CONTROL, FLIGHT, HEALTH_CHECK, NEEDED, Tokens, denied

UNEXPECTED: Final = "the server met an unexpected error; its log says more"
STRANGER: Final = "it has none of the server's tokens"
NO_METHOD: Final = "there is no such method"
_LOG = logging.getLogger(__name__)

ALWAYS: Final = frozenset(
    {HEALTH_CHECK}
    | {
        CONTROL + name
        for name in (
            *("GetInfo", "GetStatus", "GetSave", "ListSaves", "RenewSave", "AbandonSave"),
            *("CommitWrite", "AbandonWrite", "ConfirmCopy", "DropCopy", "Drain"),
        )
    }
)
"""Methods answered while the server drains too: whoever waits for a save to become durable goes on waiting, and what
was begun may be ended."""


PROMPT: Final = frozenset(
    {HEALTH_CHECK}
    | {
        CONTROL + name
        for name in ("GetInfo", "GetStatus", "Drain", "RenewSave", "CommitWrite", "AbandonWrite")
    }
)
"""Methods that don't wait for storage, and aren't counted: there is a thread for them whatever others wait for."""

ENDING: Final = frozenset({CONTROL + name for name in ("AbandonSave", "ConfirmCopy", "DropCopy")})
"""Methods that may, and end what was begun: others leave them some threads."""


def no_scope(method: str, needed: Scope, given: Scope) -> str:
    """Why a call is refused whose token is right, as the log says it."""
    return f"{method.rpartition('/')[2]} needs a token of scope {needed}, not {given}"


class ControlInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Refuses calls without a token, or of no scope for their method; turns errors of the others into status."""

    def __init__(
        self, tokens: Tokens, admission: Admission, latencies: Latencies, log: RequestLog | None = None
    ) -> None:
        self._tokens = tokens
        self._admission = admission
        self._latencies = latencies
        self._log = log or RequestLog()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata or ()
        request_id = received_request_id([value for key, value in metadata if key == HEADER])
        scope = self._tokens.scope_of([value for key, value in metadata if key == "authorization"])
        if scope is None:
            told = encode_error(ConfigurationError(REFUSED_CALLER))
            return self._refusal(request_id, grpc.StatusCode.UNAUTHENTICATED, told, STRANGER)
        needed = NEEDED.get(method)
        handler = continuation(handler_call_details) if needed is not None else None
        if needed is None or handler is None or handler.unary_unary is None:
            return self._refusal(request_id, grpc.StatusCode.UNIMPLEMENTED, "", NO_METHOD)
        if scope < needed:
            told = encode_error(denied(needed, scope))
            return self._refusal(
                request_id, grpc.StatusCode.PERMISSION_DENIED, told, no_scope(method, needed, scope)
            )
        # What the request's bytes are is found out in the call: gRPC would log what isn't protobuf, and say INTERNAL.
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, request_id, handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self,
        method: str,
        request_id: str,
        behaviour: Callable[[Any, grpc.ServicerContext], Any],
        parse: Callable[[bytes], Any] | None,
    ) -> Callable[[bytes, grpc.ServicerContext], Any]:
        kind = method.rpartition("/")[2]
        admitted: Callable[[], AbstractContextManager[None]] = nullcontext
        if method not in PROMPT:
            admitted = partial(self._admission.call, begins=method not in ALWAYS, ends=method in ENDING)

        def answer(sent: bytes, context: grpc.ServicerContext, request: Request) -> Any:
            with self._latencies.timed(kind), admitted():
                asked = _parsed(sent, parse)
                request.is_about(_subject(asked))
                return behaviour(asked, context)

        def call(sent: bytes, context: grpc.ServicerContext) -> Any:
            request, began = Request(request_id, kind, context.peer()), time.perf_counter()
            with serving(request):
                try:
                    return answer(sent, context, request)
                except TorchCacheError as error:
                    self._log.failed(kind, error)
                    context.abort(status_code(error), encode_error(error))
                except Exception:  # noqa: BLE001 - logged, and told without its text
                    _LOG.exception("%s failed unexpectedly", method)
                    context.abort(grpc.StatusCode.INTERNAL, encode_error(TorchCacheError(UNEXPECTED)))
                finally:
                    self._log.ended(kind, time.perf_counter() - began)

        return call

    def _refusal(
        self, request_id: str, code: grpc.StatusCode, details: str, why: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def refuse(_requests: Any, context: grpc.ServicerContext) -> Any:
            with serving(Request(request_id, "", context.peer())):
                self._log.refused("a call", why)
            context.abort(code, details)

        # Of a call that streams: a unary one would be refused once its request has come, and a stranger who never sends
        # that would hold one of the calls that may run at once.
        return grpc.stream_unary_rpc_method_handler(refuse)


def _parsed(request: bytes, parse: Callable[[bytes], Any] | None) -> Any:
    try:
        return request if parse is None else parse(request)
    except DecodeError:
        raise ConfigurationError(
            "the request is no message of this call: are client and server of the same version?"
        ) from None


def _subject(asked: Any) -> str:
    """What a request is about, as far as its message says: a dataset, the path of a save, or what it lists."""
    if namespace := getattr(asked, "namespace", ""):
        return str(namespace)
    ref = getattr(asked, "save", asked)
    path = getattr(ref, "path", "") or getattr(ref, "key", "") or getattr(ref, "prefix", "")
    return f"{getattr(ref, 'store', '')}/{path}" if path else ""


class RequestId(fl.ServerMiddleware):  # type: ignore[misc]  # pyarrow is untyped
    """Brings a Flight call's id from its headers to its handler."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id


class DataAuthentication(fl.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """Refuses Flight calls without a token, or of no scope for them, and every method but do_get and do_put."""

    def __init__(self, tokens: Tokens, log: RequestLog | None = None) -> None:
        super().__init__()
        self._tokens = tokens
        self._log = log or RequestLog()

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> RequestId:
        """Raises the Flight error of a refused call."""
        request_id, method = received_request_id(headers.get(HEADER, ())), info.method.name
        scope = self._tokens.scope_of(headers.get("authorization", ()))
        if scope is None:
            self._refuse(request_id, method, STRANGER)
            text = encode_error(ConfigurationError(REFUSED_CALLER))
            raise fl.FlightUnauthenticatedError(text, text.encode())
        needed = NEEDED.get(FLIGHT + method)
        if needed is None or scope < needed:
            self._refuse(request_id, method, NO_METHOD if needed is None else no_scope(method, needed, scope))
            unknown = ConfigurationError("the server knows no Flight call but do_get and do_put")
            text = encode_error(unknown if needed is None else denied(needed, scope))
            raise fl.FlightUnauthorizedError(text, text.encode())
        return RequestId(request_id)

    def _refuse(self, request_id: str, method: str, why: str) -> None:
        with serving(Request(request_id, method, "")):  # who asks, Flight doesn't say here
            self._log.refused(method, why)


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
def flight_errors(call: str, log: RequestLog) -> Iterator[None]:
    """Around a Flight handler: what it raises is logged, and becomes a Flight error that carries ours."""
    try:
        yield
    except TorchCacheError as error:
        log.failed(call, error)
        raise flight_error(error) from None
    except (fl.FlightError, GeneratorExit):
        raise
    except Exception:  # noqa: BLE001 - what else comes is logged, and told without its text
        _LOG.exception("%s failed unexpectedly", call)
        raise flight_error(TorchCacheError(UNEXPECTED)) from None
