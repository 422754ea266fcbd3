"""The id of a request: made by the client, sent with every call of both lanes, and named by logs and errors.

One id is of one call, or of one read that asks several servers, or one of them again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Final

from torchcache.tokens import MIN_CHARACTERS

HEADER: Final = "torchcache-request-id"
"""gRPC's metadata, and Flight's header, that carries it."""

MAX_CHARACTERS: Final = MIN_CHARACTERS - 1
"""Shorter than any token: none that a client sends here by mistake gets into a log."""

_FORM: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_CHARACTERS - 1}}}", re.ASCII)


def new_request_id() -> str:
    """Twelve hex digits: among a million others in a log it is alone, and it can be typed."""
    return secrets.token_hex(6)


def received_request_id(values: Sequence[str | bytes]) -> str:
    """The id in the headers of that name; a new one unless there is just one, of letters, digits, dashes.

    What a stranger sends is written into logs: so nothing else of it ever is.
    """
    if len(values) == 1:
        text = values[0] if isinstance(values[0], str) else values[0].decode("latin-1")
        if is_request_id(text):
            return text
    return new_request_id()


def is_request_id(text: str) -> bool:
    """Whether it has the form of one."""
    return _FORM.fullmatch(text) is not None
