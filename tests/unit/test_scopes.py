"""Which scope each call needs, and who has it."""

from __future__ import annotations

import hmac
from typing import Any

import pyarrow.flight as fl
import pytest
from torchcache_server.service import scopes
from torchcache_server.service.admission import Admission
from torchcache_server.service.interceptors import ControlInterceptor, DataAuthentication
from torchcache_server.service.latencies import Latencies
from torchcache_server.service.scopes import CONTROL, FLIGHT, HEALTH_CHECK, NEEDED, Tokens

from torchcache.tokens import Scope, parse_tokens
from torchcache.wire.v1 import cache_pb2

READ, WRITE, ADMIN = "r" * 20, "w" * 20, "a" * 20
TOKENS = Tokens(parse_tokens(f"{ADMIN}\nread {READ}\nwrite {WRITE}"))
SERVICE = cache_pb2.DESCRIPTOR.services_by_name["Control"]


def test_every_method_has_a_scope_and_every_scope_a_method() -> None:
    """A method that is added to the protocol is refused until somebody has decided what it needs."""
    methods = {CONTROL + method.name for method in SERVICE.methods}
    assert set(NEEDED) == methods | {HEALTH_CHECK, f"{FLIGHT}DO_GET", f"{FLIGHT}DO_PUT"}
    assert f"/{SERVICE.full_name}/" == CONTROL


def test_what_changes_something_is_not_for_readers() -> None:
    changing = (
        "Commit",
        "Delete",
        "Put",
        "Write",
        "Reserve",
        "Renew",
        "Borrow",
        "Return",
        "Abandon",
        "Copy",
        "Policy",
        "Evict",
        "Set",
        "Drain",
    )
    for method, needed in NEEDED.items():
        assert (needed > Scope.READ) == any(word in method for word in (*changing, "Publish", "DO_PUT")), (
            method
        )


@pytest.mark.parametrize(("token", "scope"), [(READ, Scope.READ), (WRITE, Scope.WRITE), (ADMIN, Scope.ADMIN)])
def test_a_token_has_its_scope(token: str, scope: Scope) -> None:
    assert TOKENS.scope_of([f"Bearer {token}"]) is scope
    assert TOKENS.scope_of([f"Bearer {token}".encode()]) is scope
    assert TOKENS.scope_of([f"Bearer {token}", f"Bearer {token}"]) is None
    assert TOKENS.scope_of([f"bearer {token}"]) is None
    assert TOKENS.scope_of([]) is None
    assert token not in repr(vars(TOKENS))


def test_every_token_is_compared_each_time_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them it is, and how much of one is right, can't be told from the time it takes."""
    lengths: list[tuple[int, int]] = []
    really = hmac.compare_digest

    def compared(a: bytes, b: bytes) -> bool:
        lengths.append((len(a), len(b)))
        return really(a, b)

    monkeypatch.setattr(scopes.hmac, "compare_digest", compared)
    for value in (f"Bearer {ADMIN}", f"Bearer {WRITE}", "Bearer a", ""):
        TOKENS.scope_of([value])
    assert lengths == [(32, 32)] * 12


class Call:
    """What gRPC tells an interceptor of a call."""

    def __init__(self, method: str, token: str) -> None:
        self.method = method
        self.invocation_metadata = (("authorization", f"Bearer {token}"),)


def test_a_method_that_is_in_no_table_is_not_even_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    less = {method: scope for method, scope in NEEDED.items() if method != f"{CONTROL}Evict"}
    monkeypatch.setattr("torchcache_server.service.interceptors.NEEDED", less)
    interceptor = ControlInterceptor(TOKENS, Admission(), Latencies())
    interceptor.intercept_service(asked.append, Call(f"{CONTROL}Evict", ADMIN))  # type: ignore[arg-type]
    interceptor.intercept_service(asked.append, Call("/x/Y", ADMIN))  # type: ignore[arg-type]
    assert asked == []
    known = Call(f"{CONTROL}GetInfo", READ)
    interceptor.intercept_service(asked.append, known)  # type: ignore[arg-type]
    assert asked == [known]


class Info:
    def __init__(self, method: Any) -> None:
        self.method = method


@pytest.mark.parametrize("method", fl.FlightMethod)
def test_the_data_port_knows_two_calls(method: Any) -> None:
    authentication = DataAuthentication(TOKENS)

    def start(token: str) -> None:
        authentication.start_call(Info(method), {"authorization": [f"Bearer {token}"]})

    allowed = {"DO_GET": (READ, WRITE, ADMIN), "DO_PUT": (WRITE, ADMIN)}.get(method.name, ())
    for token in (READ, WRITE, ADMIN):
        if token in allowed:
            start(token)
        else:
            with pytest.raises(fl.FlightUnauthorizedError):
                start(token)
    with pytest.raises(fl.FlightUnauthenticatedError):
        start("another token, of nobody")
