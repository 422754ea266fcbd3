"""S3 over TLS, by botocore and without it: the authorities of AWS_CA_BUNDLE, and nobody else's word."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest
from torchcache_server.understore.retry import RetryPolicy
from torchcache_server.understore.s3 import S3UnderStore
from torchcache_server.understore.s3_client import S3Clients
from torchcache_server.understore.s3_plain import PlainGets

from examples.seaweedfs import environment
from tests.integration.test_server_tls import certificate
from tests.unit.scripted_s3 import Held, ScriptedS3
from torchcache.errors import ConfigurationError
from torchcache.model import ByteRange, ObjectId, ObjectInfo

__all__ = ["certificate"]

DATA = bytes(range(256)) * 999
KEYS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "secret"}


def test_plain_gets_believe_the_same_authorities(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ScriptedS3()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    fake._server.socket = context.wrap_socket(fake._server.socket, server_side=True)
    settings = {
        "AWS_ENDPOINT_URL": fake.endpoint_url.replace("http:", "https:"),
        "AWS_REGION": "us-east-1",
        "AWS_CA_BUNDLE": str(certificate[0]),
    }
    held = Held(DATA)
    info = ObjectInfo(ObjectId("s3", "key", held.etag.strip('"')), len(DATA))
    with fake, environment(settings):
        fake.objects["bucket/key"] = held
        under_store = S3UnderStore(
            "s3", "s3://bucket", credentials=KEYS, policy=RetryPolicy(tries=2, first_s=0.001)
        )

        def read(start: int, end: int) -> bytearray:
            return under_store.read(info, ByteRange(start, end), deadline=time.monotonic() + 60)

        asked = []
        get = PlainGets.get
        monkeypatch.setattr(PlainGets, "get", lambda *given: asked.append(given) or get(*given))
        assert read(0, len(DATA)) == DATA
        assert asked == []  # botocore goes first
        assert read(0, len(DATA)) == DATA
        assert read(5, 70_000) == DATA[5:70_000]
        assert len(asked) == 2

        # Of an authority that nobody named the plain way believes nothing either.
        clients: S3Clients = under_store._calls.clients
        plain = clients.plain(clients.get(time.monotonic() + 60))
        plain.close()
        plain._authorities, plain._tls = None, None
        with pytest.raises(ConfigurationError, match=r"TLS with https://.* failed"):
            read(0, len(DATA))
        under_store.close()
