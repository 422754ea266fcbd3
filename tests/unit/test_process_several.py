"""From one configuration to several servers' command lines, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.process.config import ServerConfig, Tls, from_settings, parse_under_stores
from torchcache_server.process.main import main
from torchcache_server.process.several import arguments, left_out, split

from torchcache.errors import ConfigurationError

CONFIG = ServerConfig(
    host="::1",
    port=7440,
    store=Path("/nvme/cache"),
    capacity_bytes=10**12 + 1,
    under_stores=(("s3", "s3://"), ("data", "file:///a=b")),
    token_file=Path("/etc/token"),
    tls=Tls(certificate=Path("/etc/cert.pem"), key=Path("/etc/key.pem")),
    drain_s=7.5,
    metrics_port=9100,
    scrub_bytes_s=10,
    min_free_bytes=0,
    lease_s=2.5,
    weight=0.5,
    max_pending_bytes=31,
    servers=3,
)


def test_each_has_its_own_and_a_share() -> None:
    split_up = split(CONFIG)
    assert [c.port for c in split_up] == [7440, 7442, 7444]
    assert [c.metrics_port for c in split_up] == [9100, 9101, 9102]
    assert [str(c.store) for c in split_up] == [f"/nvme/cache/server-{i}" for i in range(3)]
    assert [c.capacity_bytes for c in split_up] == [333_333_333_333] * 3
    assert [c.scrub_bytes_s for c in split_up] == [4] * 3
    assert [c.max_pending_bytes for c in split_up] == [10] * 3
    shared = {
        "port": 1,
        "metrics_port": 1,
        "store": Path(),
        "capacity_bytes": 1,
        "scrub_bytes_s": 1,
        "max_pending_bytes": 1,
        "servers": 1,
    }
    assert all(replace(c, **shared) == replace(CONFIG, **shared) for c in split_up)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        *split(CONFIG),
        *split(
            replace(
                CONFIG, host="127.0.0.1", tls=None, metrics_port=None, min_free_bytes=None, scrub_bytes_s=0
            )
        ),
        *split(replace(CONFIG, metrics_port=0, min_free_bytes=5)),
    ],
)
def test_the_command_line_says_all_of_it(config: ServerConfig) -> None:
    options: dict[str, Any] = main.make_context("serve", list(arguments(config))).params
    under_stores = parse_under_stores(options.pop("under_store"))
    for name in ("config", "supervised"):
        options.pop(name)
    assert from_settings(options | {"under_stores": under_stores}) == config


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"port": 0}, "need a port"), ({"port": 65_531}, "need 6 ports"), ({"metrics_port": 65_534}, "ports")],
)
def test_ports_that_there_are_not(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        split(replace(CONFIG, **changed))
    assert split(replace(CONFIG, port=65_530))


@pytest.mark.parametrize("servers", [0, -1, 65, 1.5, "2", True])
def test_numbers_of_servers_that_are_none(servers: object) -> None:
    settings = {"store": "/s", "capacity": "1GB", "under_stores": {"s3": "s3://"}, "servers": servers}
    with pytest.raises(ConfigurationError, match="servers"):
        from_settings(settings)


def test_stores_that_nobody_serves_now_are_found(tmp_path: Path) -> None:
    for name in ("server-0", "server-1", "server-2", "server-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").touch()
    (tmp_path / "server-7").mkdir()
    assert left_out(tmp_path, 2) == [tmp_path / "server-2", tmp_path / "server-x"]
    (tmp_path / "store.json").touch()
    assert left_out(tmp_path, 3) == [tmp_path, tmp_path / "server-x"]
    assert left_out(tmp_path / "absent", 3) == []
