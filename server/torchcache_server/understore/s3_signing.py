"""AWS Signature Version 4 of GET requests without a body or query. Pure.

As in "Authenticating Requests: Using the Authorization Header" of the Amazon S3 API Reference.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final
from urllib.parse import quote

ALGORITHM: Final = "AWS4-HMAC-SHA256"
_NO_BODY: Final = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Keys:
    """Who signs. `token` is empty for keys that last."""

    access: str
    secret: str
    token: str

    def __repr__(self) -> str:
        return "Keys(...)"


@dataclass(frozen=True, slots=True)
class Scope:
    """What a signature is good for, beside its day."""

    region: str
    service: str


def escaped(key: str) -> str:
    """An S3 key as it stands in a path, in the request and in what is signed."""
    return quote(key, safe="/~")


def signed(path: str, headers: Mapping[str, str], keys: Keys, scope: Scope, now: datetime) -> dict[str, str]:
    """All headers to send with a GET of `path` (escaped): `headers`, Host among them, and the signature's own.

    `now` is UTC. The names of `headers` are lower-case.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    sent = {**headers, "x-amz-content-sha256": _NO_BODY, "x-amz-date": stamp}
    if keys.token:
        sent["x-amz-security-token"] = keys.token
    names = ";".join(sorted(sent))
    lines = "".join([f"{name}:{value.strip()}\n" for name, value in sorted(sent.items())])
    request = f"GET\n{path}\n\n{lines}\n{names}\n{_NO_BODY}"
    within = f"{stamp[:8]}/{scope.region}/{scope.service}/aws4_request"
    text = f"{ALGORITHM}\n{stamp}\n{within}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(keys, stamp[:8], scope), text.encode(), "sha256").hex()
    sent["authorization"] = (
        f"{ALGORITHM} Credential={keys.access}/{within}, SignedHeaders={names}, Signature={signature}"
    )
    return sent


@lru_cache(maxsize=8)
def _signing_key(keys: Keys, day: str, scope: Scope) -> bytes:
    key = f"AWS4{keys.secret}".encode()
    for part in (day, scope.region, scope.service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
