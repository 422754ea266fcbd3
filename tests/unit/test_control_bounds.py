"""Calls that wait for storage leave threads for those that ask how the server is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from torchcache_server.process.config import ServerConfig
from torchcache_server.process.listeners import ControlListener
from torchcache_server.service.admission import CONTROL_THREADS, MAX_CALLS, Admission
from torchcache_server.service.latencies import Latencies
from torchcache_server.service.scopes import Tokens

from torchcache.errors import Overloaded
from torchcache.tokens import parse_tokens
from torchcache.wire.status import error_from_status
from torchcache.wire.v1 import cache_pb2 as pb
from torchcache.wire.v1 import cache_pb2_grpc

TOKEN = "a-token-of-the-tests"


class Waiting(cache_pb2_grpc.ControlServicer):
    """Answers who asks for a save once it may."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.at_work = threading.Semaphore(0)

    def GetSave(self, request: pb.GetSaveRequest, context: Any) -> pb.SaveReply:
        self.at_work.release()
        assert self.go.wait(120)
        return pb.SaveReply()

    def CommitWrite(self, request: pb.CommitWriteRequest, context: Any) -> pb.CommitWriteReply:
        return pb.CommitWriteReply()

    def AbandonSave(self, request: pb.AbandonSaveRequest, context: Any) -> pb.AbandonSaveReply:
        return pb.AbandonSaveReply()

    def GetInfo(self, request: pb.InfoRequest, context: Any) -> pb.InfoReply:
        return pb.InfoReply(server_id="it")


class Control:
    def __init__(self, folder: Path) -> None:
        self.admission, self.service = Admission(), Waiting()
        config = ServerConfig(
            host="127.0.0.1",
            port=0,
            store=folder / "store",
            capacity_bytes=1 << 30,
            under_stores=(("file", f"file://{folder}"),),
            token_file=folder / "token",
        )
        self.listener = ControlListener(
            config, Tokens(parse_tokens(TOKEN)), self.admission, Latencies(), None
        )
        self.listener.start(self.service)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.listener.port}")
        self.stub = cache_pb2_grpc.ControlStub(self.channel)

    def call(self, method: str, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        return getattr(self.stub, method)(request, timeout=120, metadata=metadata)

    def close(self) -> None:
        self.service.go.set()
        self.channel.close()
        self.listener.stop(1.0)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    yield made
    made.close()


def test_while_all_others_wait_a_server_says_how_it_is(control: Control) -> None:
    with ThreadPoolExecutor(CONTROL_THREADS) as callers:
        waiting = [
            callers.submit(control.call, "GetSave", pb.GetSaveRequest(path="p")) for _ in range(MAX_CALLS)
        ]
        for _ in waiting:
            assert control.service.at_work.acquire(timeout=120)
        with pytest.raises(grpc.RpcError) as one_more:
            control.call("GetSave", pb.GetSaveRequest(path="p"))
        error = error_from_status(one_more.value.code(), one_more.value.details())
        assert isinstance(error, Overloaded)
        assert error.retry_after_s is not None
        assert control.admission.refused_calls == 1
        assert control.call("GetInfo", pb.InfoRequest()).server_id == "it"
        assert control.call("CommitWrite", pb.CommitWriteRequest()) == pb.CommitWriteReply()
        assert control.call("AbandonSave", pb.AbandonSaveRequest()) == pb.AbandonSaveReply()
        control.service.go.set()
        for call in waiting:
            call.result(120)
    control.call("GetSave", pb.GetSaveRequest(path="p"))


def test_a_drain_waits_for_what_begins_something_and_for_nothing_else() -> None:
    admission = Admission()
    with admission.call():
        assert admission.wait_until_idle(0.0)
        with admission.call(begins=True):
            assert not admission.wait_until_idle(0.0)
    assert admission.wait_until_idle(0.0)
