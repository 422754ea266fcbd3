"""How boto3's clients are set up."""

from __future__ import annotations

import inspect
import time

from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.understore.base import Counters
from torchcache_server.understore.s3_client import S3Clients


def test_calls_beside_a_full_load_of_fills_have_connections() -> None:
    fills = inspect.signature(ReadThrough).parameters["fill_threads"].default
    uploads = inspect.signature(WriteBack).parameters["upload_threads"].default
    clients = S3Clients(Counters(), {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK"})
    client = clients.get(time.monotonic() + 60)
    kept = client.meta.config.max_pool_connections
    clients.close()
    # Uploads, parts of them and published objects; and some listings.
    assert kept >= fills + 3 * uploads + 16
