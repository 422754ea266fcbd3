"""botocore's errors to ours: one table, kept pure. Every message names the URI and says what to do."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    IntegrityError,
    ObjectNotFound,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache_server.understore.base import changed
from torchcache_server.understore.s3_signing import Keys

Action = Literal["read", "write", "list", "stat", "delete"]

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) of the process that runs the pool"
_ENDPOINT = "check AWS_ENDPOINT_URL and that the server runs"

_CREDENTIAL_CODES = {
    "AccessDenied": "the credentials don't allow it; " + _KEYS + " and what they may do",
    "AllAccessDisabled": "all access to the bucket is disabled; ask its owner",
    "AuthorizationHeaderMalformed": "the request was signed for the wrong region; set AWS_REGION to the bucket's",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "InvalidAccessKeyId": "the access key isn't known there; " + _KEYS,
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much; set the clock",
    "SignatureDoesNotMatch": "the secret key is wrong; " + _KEYS,
    "403": "the credentials are wrong or don't allow it; " + _KEYS + " and what they may do",
}
_TRANSIENT_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
}
_OVERLOAD_CODES = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "SlowDown",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_MOST_SKEW_S = 15 * 60  # of a signed request, by S3's rules
# Codes that leave the reason open, or name it. The answer to a HEAD has no body: botocore takes its status for a code.
_MAY_BE_SKEW = {"", "403", "RequestTimeTooSkewed"}
_SHORTEST_SECRET = 8  # what is shorter is none, and may be a part of any word
_DAMAGED = (boto.IncompleteReadError, boto.FlexibleChecksumError)


def status_of(error: boto.ClientError) -> int:
    """The HTTP status of a refusal."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: boto.ClientError) -> str:
    """S3's error code; the status as text where there was no body to hold one."""
    return str(error.response.get("Error", {}).get("Code", ""))


def clock_off_s(error: boto.ClientError, now_s: float) -> float:
    """How far `now_s`, of this machine, is ahead of the server by the Date of its answer; 0.0 if it has none."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return now_s - parsedate_to_datetime(str(headers.get("date", ""))).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def is_credential_error(error: Exception) -> bool:
    """True where other credentials may help."""
    if isinstance(error, boto.ClientError):
        return code_of(error) in _CREDENTIAL_CODES
    return isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError)


def translate(error: Exception, *, action: Action, uri: str, endpoint: str) -> TorchCacheError:  # noqa: PLR0911 - a table
    """What `error`, met while doing `action` to `uri` at `endpoint`, is to our caller."""
    if isinstance(error, boto.ClientError):
        return _refused(error, action=action, uri=uri, endpoint=endpoint)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return ConfigurationError(
            f"can't {action} {uri}: no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE, for the process that runs the pool",
            object=uri,
        )
    if isinstance(error, _DAMAGED):
        return IntegrityError(f"{uri} arrives damaged from {endpoint}: {error}", object=uri)
    if isinstance(error, boto.SSLError):
        return ConfigurationError(
            f"can't {action} {uri}: TLS with {endpoint} failed ({_brief(error)}); "
            "check AWS_ENDPOINT_URL and AWS_CA_BUNDLE",
            object=uri,
        )
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
        return ServerUnavailable(
            f"can't {action} {uri}: {endpoint} can't be reached; {_ENDPOINT}", object=uri
        )
    if isinstance(error, boto.HTTPClientError | HTTPError | OSError):
        return ServerUnavailable(
            f"can't {action} {uri}: the connection to {endpoint} broke off ({_brief(error)}); {_ENDPOINT}",
            object=uri,
        )
    if isinstance(error, boto.BotoCoreError | ValueError):
        return ConfigurationError(f"can't {action} {uri}: {error}", object=uri)
    return TorchCacheError(f"can't {action} {uri}: {type(error).__name__}: {error}", object=uri)


def _refused(error: boto.ClientError, *, action: Action, uri: str, endpoint: str) -> TorchCacheError:  # noqa: PLR0911
    code, status = code_of(error), status_of(error)
    said = str(error.response.get("Error", {}).get("Message", "")) or code
    off_s = clock_off_s(error, time.time())
    if status == 403 and code in _MAY_BE_SKEW and abs(off_s) > _MOST_SKEW_S:
        return ConfigurationError(
            f"{endpoint} refuses to {action} {uri}: this machine's clock is {abs(off_s) / 60:.0f} minutes "
            f"{'ahead of' if off_s > 0 else 'behind'} the server's; set the clock",
            object=uri,
        )
    if code in _CREDENTIAL_CODES:
        return ConfigurationError(
            f"{endpoint} refuses to {action} {uri}: {_CREDENTIAL_CODES[code]}", object=uri
        )
    if code == "NoSuchBucket":
        return no_such_bucket(uri, endpoint)
    if code in _OVERLOAD_CODES or status in (429, 503):
        return Overloaded(
            f"{endpoint} is too busy to {action} {uri} ({code}); ask less at a time", object=uri
        )
    if status == 501:
        return ConfigurationError(
            f"{endpoint} can't {action} {uri} the way torchcache needs ({said}): it must know conditional requests",
            object=uri,
        )
    if code in _TRANSIENT_CODES or status >= 500:
        return ServerUnavailable(f"{endpoint} failed to {action} {uri} ({code}: {said})", object=uri)
    if action == "write" and (status == 412 or code == "NoSuchKey"):
        return AlreadyExists(
            f"{uri} is not as it was expected to be: another writer was there first", object=uri
        )
    if status in (412, 416):
        return changed(uri)
    if status == 404:
        return (
            vanished(uri)
            if action == "read"
            else ObjectNotFound(f"there is no {uri}; check the name", object=uri)
        )
    if 300 <= status < 400:
        return ConfigurationError(
            f"{endpoint} sends requests for {uri} elsewhere, which is not followed; "
            "set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to its server",
            object=uri,
        )
    return ConfigurationError(f"{endpoint} refuses to {action} {uri}: {code}: {said}", object=uri)


def no_such_bucket(uri: str, endpoint: str) -> ObjectNotFound:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    return ObjectNotFound(
        f"there is no bucket {bucket!r} at {endpoint}, asked for {uri}; check the bucket's name and AWS_ENDPOINT_URL",
        object=uri,
    )


def vanished(uri: str) -> ObjectNotFound:
    return ObjectNotFound(
        f"{uri} is gone from the under-store since it was listed; create the dataset again to list what is there now",
        object=uri,
    )


def without_secrets(endpoint_url: str) -> str:
    """The endpoint for messages: scheme, host and port, without user, password, path or query."""
    parts = urlsplit(endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def without_keys(error: TorchCacheError, keys: Keys | None) -> TorchCacheError:
    """The error without what only the server may know: a storage may tell back what it was sent."""
    message = error.message
    for secret in (keys.secret, keys.token) if keys is not None else ():
        if len(secret) >= _SHORTEST_SECRET:
            message = message.replace(secret, "...")
    if message == error.message:
        return error
    return error.saying(message)


def _brief(error: Exception) -> str:
    inner = error.kwargs.get("error", error) if isinstance(error, boto.BotoCoreError) else error
    return f"{type(inner).__name__}: {inner}"
