"""A server dies in the middle of a cold epoch: the under-store isn't stampeded, whoever reads, and however many (F1).

Counted at the under-store itself: each server has credentials of its own there, so that who asked for what is known.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.epoch_reader_child import BATCH
from tests.integration.self_describing import content
from tests.integration.server_process import ServerProcess
from tests.unit.scripted_s3 import Held, Request, ScriptedS3
from torchcache.threads import Threads

SERVERS, CLIENTS, OBJECTS, OBJECT_BYTES = 4, 3, 960, 20_000
PAUSE_S = 0.01
"""An answer of the under-store takes as long, so that servers have fetches on their way when one of them dies."""


class Source(ScriptedS3):
    """An S3 that notes which server gets which chunk. Every object is one chunk."""

    def __init__(self) -> None:
        super().__init__()
        self._noting = threading.Lock()
        self.gets: list[tuple[str, str]] = []
        """Of each GET of an object who asked, by key id, and for what."""
        self.always = self._note

    def _note(self, request: Request) -> bool:
        if request.command == "GET" and request.key in self.objects:
            (who,) = re.findall(r"Credential=([^/]+)/", request.headers["Authorization"])
            with self._noting:
                self.gets.append((who, request.key))
            time.sleep(PAUSE_S)
        return False


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        for number in range(OBJECTS):
            key = f"bucket/{number:04d}"
            source.objects[key] = Held(content(key, 0, OBJECT_BYTES))
        yield source


def test_a_server_killed_amid_a_cold_epoch_is_no_stampede(tmp_path: Path, home: Path, source: Source) -> None:
    """What must be fetched: all that was read, once for the pool that is left, and what the dead server had, once."""

    def server(number: int) -> ServerProcess:
        return ServerProcess(
            *("--listen", "127.0.0.1:0", "--store", tmp_path / f"store-{number}", "--capacity", "1GB"),
            *("--under-store", "s3=s3://", "--token-file", home / "token"),
            token_file=home / "token",
            environment={
                "AWS_ENDPOINT_URL": source.endpoint_url,
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": f"server{number}",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
            log=tmp_path / f"log-{number}",
        )

    listing = tmp_path / "listing"
    listing.write_text(
        json.dumps(
            [["s3", key, held.etag.strip('"'), len(held.data)] for key, held in source.objects.items()]
        )
    )
    with ExitStack() as closing:
        (home / "token").write_text("a-token-of-the-test\n")
        (home / "token").chmod(0o600)
        with Threads(SERVERS, name="start") as threads:
            starting = [threads.submit(closing.enter_context, server(number)) for number in range(SERVERS)]
            servers = [one.result() for one in starting]
        address = ",".join(one.address for one in servers)
        arguments = [address, str(home / "token"), str(listing)]
        clients = [
            closing.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.integration.epoch_reader_child", *arguments, str(seed)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for seed in range(CLIENTS)
        ]
        for client in clients:
            closing.callback(client.kill)
            assert client.stdout is not None and client.stdout.readline() == "ready\n"
        for client in clients:
            assert client.stdin is not None
            print(file=client.stdin, flush=True)
        # All are under way, and none is through: each has two thirds of its batches to come at least.
        for client in clients:
            assert client.stdout is not None
            while int(client.stdout.readline()) < OBJECTS // CLIENTS // BATCH * BATCH:
                pass
        servers[0].process.kill()
        servers[0].process.wait()
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.read().splitlines()[-1] == str(OBJECTS), "it read all of it"
            assert client.wait() == 0
    of_the_dead = {key for who, key in source.gets if who == "server0"}
    of_the_others = {key for who, key in source.gets if who != "server0"}
    assert of_the_dead and of_the_dead != set(source.objects), "it was in the middle"
    needed = len(of_the_dead) + len(of_the_others)
    print(
        f"{len(source.gets)} GETs, {needed} needed, {len(of_the_dead)} of them by the server that was killed"
    )
    assert len(source.gets) <= 1.1 * needed
