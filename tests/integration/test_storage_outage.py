"""Storage fails everything for as long as there are retries in stock, and then is back."""

from __future__ import annotations

from pathlib import Path

from tests.integration.self_describing import content
from tests.integration.server_process import ServerProcess
from tests.unit.scripted_s3 import Held, Request, ScriptedS3
from torchcache.wire.v1 import cache_pb2 as pb

OBJECTS, OBJECT_BYTES = 200, 10_000
"""More than twice as many as there are retries in stock, and than there are threads that fill."""


def fail(request: Request) -> bool:
    request.refuse(500, "InternalError")
    return True


def test_a_server_is_as_good_as_ever_after_an_outage_that_used_up_its_retries(
    tmp_path: Path, home: Path
) -> None:
    """F24, I4: meanwhile each read is told at once, not by its deadline; then all are served."""
    (home / "token").write_text("a-token-of-the-test\n")
    (home / "token").chmod(0o600)
    contents = {f"bucket/{n:03d}": content(f"bucket/{n:03d}", 0, OBJECT_BYTES) for n in range(OBJECTS)}
    with (
        ScriptedS3() as s3,
        ServerProcess(
            *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
            *("--under-store", "s3=s3://", "--token-file", home / "token"),
            token_file=home / "token",
            environment={
                "AWS_ENDPOINT_URL": s3.endpoint_url,
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
        ) as server,
    ):
        s3.objects.update({key: Held(data) for key, data in contents.items()})
        refs = [
            pb.ObjectRef(store="s3", key=key, version=held.etag.strip('"'), size=OBJECT_BYTES)
            for key, held in s3.objects.items()
        ]
        s3.always = fail
        for _ in range(2):  # the second time nothing is left for retries
            for got in server.client.read(refs, timeout_s=50):
                assert isinstance(got, str)
                assert "ServerUnavailable" in got, "it waited for its deadline"
        s3.always = None
        assert server.client.read(refs, timeout_s=50) == list(contents.values())
