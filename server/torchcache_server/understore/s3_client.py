"""Calls to one S3: boto3 clients made late, without retries of their own; ours around them; every request counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import awsrequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpsession import get_cert_path
from urllib3.exceptions import HTTPError

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache_server.understore.base import Counters, RequestKind
from torchcache_server.understore.retry import Retrier, RetryPolicy
from torchcache_server.understore.s3_connection import WholeHead
from torchcache_server.understore.s3_errors import (
    Action,
    is_credential_error,
    translate,
    without_keys,
    without_secrets,
)
from torchcache_server.understore.s3_names import S3Object
from torchcache_server.understore.s3_plain import PlainGets, Way
from torchcache_server.understore.s3_signing import Keys

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


# botocore's own connections, whose answers http.client reads: nowhere else can it be told whether a head came whole.
class _WholeAnswer(awsrequest.AWSHTTPResponse, WholeHead):
    """To a request that waited to be told to go on."""


for _kind in (awsrequest.AWSHTTPConnection, awsrequest.AWSHTTPSConnection):
    cast(Any, _kind).response_class = WholeHead
cast(Any, awsrequest).AWSHTTPResponse = _WholeAnswer

CONNECTIONS = 160
"""Kept for reuse. All 128 threads that fill may ask at once, uploads and listings beside them: a connection beyond
these is closed after its call, with a warning of urllib3's, and the next call opens another."""

_AWS = (".amazonaws.com", ".amazonaws.com.cn")
_CONNECT_S = 5.0
_PATIENCE_S = (16.0, 4.0, 1.0)

_KINDS: dict[str, RequestKind] = {
    "GetObject": "read",
    "PutObject": "write",
    "CreateMultipartUpload": "write",
    "UploadPart": "write",
    "CompleteMultipartUpload": "write",
    "AbortMultipartUpload": "write",
}


class S3Clients:
    """One boto3 client for each patience: the longest wait for a silent server. Thread-safe.

    botocore fixes its timeouts when a client is made, so a call takes the client whose patience fits its deadline.
    """

    def __init__(self, counters: Counters, credentials: Mapping[str, str] | None) -> None:
        self._counters = counters
        self._credentials = dict(credentials or {})
        self._clients: dict[float, S3Client] = {}
        self._plain: dict[S3Client, PlainGets] = {}
        self._last = threading.local()
        self._lock = threading.Lock()

    def plain(self, client: S3Client) -> PlainGets:
        """GETs without botocore, as patient as `client`, and by its credentials."""
        with self._lock:
            # A client that was let go of meanwhile makes its call to the end.
            return self._plain.get(client) or PlainGets(lambda: None, None, 1.0, 1.0)

    def way_asked(self, key: str) -> Way | None:
        """The way of this thread's last GET by botocore, which was for `key`; None if only botocore can go it."""
        url, headers = self._last.get
        return Way.of(url, headers, key)

    def get(self, deadline: float) -> S3Client:
        """A client that gives up on a silent server within half the time left, so that there can be another try.

        Raises ConfigurationError where boto3's settings are wrong.
        """
        left_s = deadline - time.monotonic()
        patience_s = next((p for p in _PATIENCE_S if p <= left_s / 2), _PATIENCE_S[-1])
        with self._lock:
            client = self._clients.get(patience_s)
            if client is None:
                client, plain = self._make(patience_s)
                self._clients[patience_s], self._plain[client] = client, plain
        return client

    def endpoint(self, deadline: float) -> str:
        """The endpoint, for messages."""
        return without_secrets(self.get(deadline).meta.endpoint_url)

    def replace_credentials(self, credentials: Mapping[str, str]) -> None:
        """Calls that start from now on use `credentials`; empty: what boto3 finds."""
        with self._lock:
            self._credentials = dict(credentials)
        self.forget()

    def forget(self) -> None:
        """The next call looks for credentials again: they may have been renewed in a file since."""
        self._let_go()

    def close(self) -> None:
        for client in self._let_go():
            client.close()

    def _let_go(self) -> Iterable[S3Client]:
        with self._lock:
            self._clients, clients = {}, self._clients
            self._plain, plain = {}, self._plain
        for gets in plain.values():
            gets.close()
        return clients.values()

    def _make(self, patience_s: float) -> tuple[S3Client, PlainGets]:
        config = Config(
            connect_timeout=min(_CONNECT_S, patience_s),
            read_timeout=patience_s,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            response_checksum_validation="when_supported",
            user_agent_extra="torchcache",
        )
        try:
            core = botocore.session.Session()
            session = boto3.session.Session(
                botocore_session=core,
                aws_access_key_id=self._credentials.get("AWS_ACCESS_KEY_ID"),
                aws_secret_access_key=self._credentials.get("AWS_SECRET_ACCESS_KEY"),
                aws_session_token=self._credentials.get("AWS_SESSION_TOKEN"),
            )
            client = session.client("s3", config=config)
            authorities = core.get_config_variable("ca_bundle") or get_cert_path(True)
        except (BotoCoreError, ValueError) as error:
            raise ConfigurationError(
                f"S3 can't be used as configured: {error}; check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
            ) from error
        client.meta.events.register("before-send.s3", self._count)
        client.meta.events.register("before-send.s3.GetObject", self._note)
        if not (urlsplit(client.meta.endpoint_url).hostname or "").endswith(_AWS):
            client.meta.events.register("before-call.s3", _stay)
        plain = PlainGets(lambda: _keys(session), authorities, patience_s, min(_CONNECT_S, patience_s))
        return client, plain

    def _note(self, *, request: AWSPreparedRequest, **_: object) -> None:
        self._last.get = request.url, request.headers

    def _count(self, *, event_name: str, **_: object) -> None:
        """Sees every request that leaves, those included that botocore adds by itself to find a bucket's region."""
        self._counters.add(_KINDS.get(event_name.rpartition(".")[2], "meta"))


def _keys(session: boto3.session.Session) -> Keys | None:
    found = session.get_credentials()
    if found is None:
        return None
    frozen = found.get_frozen_credentials()
    return Keys(frozen.access_key or "", frozen.secret_key or "", frozen.token or "")


def _stay(*, context: dict[str, Any], **_: object) -> None:
    """Has botocore take a redirect for an error.

    It follows one by looking for the bucket's region, and recurses without end if that request is redirected as well.
    At AWS, whose answers name the region, it may: that leads to no host but AWS's own.
    """
    context.get("s3_redirect", {})["redirected"] = True


class S3Calls:
    """Requests to one S3, with errors translated: `once`, or with retries: `run`. Thread-safe."""

    def __init__(
        self, counters: Counters, credentials: Mapping[str, str] | None, policy: RetryPolicy | None = None
    ) -> None:
        self.counters = counters
        self.clients = S3Clients(counters, credentials)
        self.retrier = Retrier(policy=policy, on_retry=counters.add_retry)

    def run(
        self,
        send: Callable[[S3Client], T],
        *,
        action: Action,
        target: S3Object,
        deadline: float,
        tries: int | None = None,
    ) -> T:
        """The result of `send`, retried while that helps and `deadline` allows. Raises errors of torchcache."""
        return self.retrier.run(
            lambda: self.once(send, action=action, target=target, deadline=deadline),
            uri=target.uri,
            deadline=deadline,
            tries=tries,
        )

    def once(self, send: Callable[[S3Client], T], *, action: Action, target: S3Object, deadline: float) -> T:
        """The result of a single `send`. Raises errors of torchcache."""
        client = self.clients.get(deadline)
        try:
            return send(client)
        except TorchCacheError:
            raise  # Some are ValueError or OSError too.
        except (BotoCoreError, ClientError, HTTPError, OSError, ValueError) as error:
            if is_credential_error(error):
                self.clients.forget()
            endpoint = without_secrets(client.meta.endpoint_url)
            told = translate(error, action=action, uri=target.uri, endpoint=endpoint)
            raise without_keys(told, self.clients.plain(client).keys()) from error
