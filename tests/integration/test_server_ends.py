"""A server that ends answers the calls that run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.process import server as process
from torchcache_server.process.config import from_settings
from torchcache_server.process.listeners import ControlListener
from torchcache_server.service.control import ControlService

from torchcache.connecting import connect


def test_a_call_that_runs_is_answered(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, stopping = threading.Event(), threading.Event()
    answer = ControlService.GetStatus

    def held(self: ControlService, request: Any, context: Any) -> Any:
        asked.set()
        assert stopping.wait(120)
        return answer(self, request, context)

    def told(self: ControlListener, grace_s: float) -> None:
        assert grace_s == 120.0
        stopped = self._server.stop(grace_s)
        stopping.set()
        stopped.wait()

    monkeypatch.setattr(process, "CALLS_S", 120.0)
    monkeypatch.setattr(ControlService, "GetStatus", held)
    monkeypatch.setattr(ControlListener, "stop", told)
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "store": tmp_path / "store", "capacity": "64MiB"}
    under_stores = {"file": f"file://{tmp_path}"}
    server = process.Server(from_settings({**settings, "min_free": 0, "under_stores": under_stores}))
    pool = connect(server.control_address)
    try:
        with ThreadPoolExecutor(1) as threads:
            status = threads.submit(pool.status)
            assert asked.wait(120)
            server.close()
            assert len(status.result(120)) == 1
    finally:
        stopping.set()
        pool.close()
        server.close()
    said = capfd.readouterr().err.splitlines()
    assert not [line for line in said if "goaway" in line and server.control_address in line]
