"""The server's settings: from options and from TOML, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torchcache_server.process.config import (
    ServerConfig,
    Tls,
    from_settings,
    parse_listen,
    parse_under_stores,
    read_toml,
)
from torchcache_server.process.life import exposed, open_key

from torchcache.errors import ConfigurationError

MINIMAL = {"store": "/data/store", "capacity": "10GB", "under_stores": {"s3": "s3://"}}


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"listen": "0.0.0.0:7440", "tls_cert": "/cert.pem", "tls_key": "/key.pem"}, True),
        (
            {
                "listen": "0.0.0.0:7440",
                "tls_cert": "/cert.pem",
                "tls_key": "/key.pem",
                "tls_client_ca": "/ca.pem",
            },
            False,
        ),
        ({"listen": "127.0.0.1:7440"}, False),
        ({"listen": "unix:///run/torchcache/cache.sock"}, False),
    ],
)
def test_a_port_that_strangers_reach_is_warned_of(settings: dict[str, Any], warned: bool) -> None:
    assert (exposed(from_settings(MINIMAL | settings)) is not None) is warned


def test_defaults(home: Path) -> None:
    config = from_settings(MINIMAL)
    assert (config.host, config.port) == ("127.0.0.1", 7440)
    assert config.store == Path("/data/store")
    assert config.capacity_bytes == 10**10
    assert config.token_file == home / "token"
    assert config.drain_s == 60
    assert config.metrics_port is None
    assert config.scrub_bytes_s == 32 * 1024**2
    assert config.min_free_bytes is None
    assert config.embedded is None


def test_toml_and_options_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        """
        listen = "10.0.0.1:9000"
        store = "/data/store"
        capacity = "10GB"
        token_file = "/etc/torchcache/token"
        tls_cert = "/etc/torchcache/cert.pem"
        tls_key = "/etc/torchcache/key.pem"
        drain_s = 5
        metrics_port = 9100
        scrub_rate = "64MiB"
        min_free = "5GB"

        [under_stores]
        s3 = "s3://"
        data = "file:///data"
        """
    )
    options: dict[str, Any] = {
        "listen": "10.0.0.1:9000",
        "store": Path("/data/store"),
        "capacity": "10GB",
        "under_stores": parse_under_stores(["s3=s3://", "data=file:///data"]),
        "token_file": Path("/etc/torchcache/token"),
        "tls_cert": Path("/etc/torchcache/cert.pem"),
        "tls_key": Path("/etc/torchcache/key.pem"),
        "drain_s": 5.0,
        "metrics_port": 9100,
        "scrub_rate": "64MiB",
        "min_free": "5GB",
        "embedded": None,
        "index": None,
    }
    assert from_settings(read_toml(file)) == from_settings(options)


@pytest.mark.parametrize("nothing", [0, "0", " 0 ", 0.0])
def test_scrub_and_free_space_can_be_none(nothing: Any) -> None:
    config = from_settings(MINIMAL | {"scrub_rate": nothing, "min_free": nothing})
    assert (config.scrub_bytes_s, config.min_free_bytes) == (0, 0)


def test_an_embedded_server_lives_in_its_pools_folder(tmp_path: Path) -> None:
    config = from_settings(
        {"embedded": tmp_path, "index": 2, "capacity": 10**9, "under_stores": {"s3": "s3://"}}
    )
    assert (config.host, config.port) == ("127.0.0.1", 0)
    assert config.store == tmp_path / "server-2" / "store"
    assert config.token_file == tmp_path / "token"
    assert config.embedded is not None
    assert config.embedded.folder == tmp_path / "server-2"
    assert config.pool_weight == 1.0, "they are alike"


def test_a_server_takes_of_the_pool_by_its_capacity_and_a_factor() -> None:
    config = from_settings(MINIMAL)
    assert config.pool_weight == config.capacity_bytes
    assert from_settings(MINIMAL | {"weight": 0.5}).pool_weight == config.capacity_bytes / 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"listen": "0.0.0.0:7440"}, "refusing to listen on 0.0.0.0 without TLS.*--tls-cert"),
        ({"listen": "[::]:7440"}, "refusing to listen"),
        ({"listen": "node-1:7440"}, "refusing to listen"),
        ({"listen": "7440"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:http"}, "HOST:PORT"),
        ({"listen": "::1:7440"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:65535"}, "the one behind it"),
        ({"listen": 7440}, "listen must be a text"),
        ({"tls_cert": "/cert.pem"}, "both a certificate and its key"),
        ({"store": None}, "store is missing"),
        ({"capacity": None}, "--capacity 100GB"),
        ({"capacity": "lots"}, "'lots' is not a size"),
        ({"under_stores": {}}, "--under-store s3=s3://"),
        ({"under_stores": {"samples": "s3://"}}, "can't name an under-store"),
        ({"under_stores": {"../x": "s3://"}}, "can't name an under-store"),
        ({"under_stores": ["s3://"]}, "must be a table"),
        ({"under_stores": {"s3": 3}}, "must be a table"),
        ({"drain_s": -1}, "drain"),
        ({"drain_s": float("nan")}, "drain"),
        ({"drain_s": "long"}, "must be a number"),
        ({"weight": 0}, "a weight of 0: give 0.01 to 100"),
        ({"weight": float("nan")}, "a weight of nan"),
        ({"metrics_port": 70000}, "metrics port"),
        (
            {"metrics_port": 9440, "metrics_host": "0.0.0.0"},
            "refusing to serve metrics on 0.0.0.0 without TLS.*--tls-cert.*a token.*--metrics-insecure",
        ),
        ({"metrics_insecure": "yes"}, "metrics_insecure must be true or false"),
        ({"scrub_rate": "fast"}, "'fast' is not a size"),
        ({"scrub_rate": -1}, "more than zero"),
        ({"scrub_rate": False}, "False is not a size"),
        ({"scrub_rate": 0.5}, "0.5 is not a size"),
        (
            {"scrub_rate": "1PB"},
            "a scrub rate of 1000000000000000 bytes a second: give 0, for none, to 100GiB",
        ),
        ({"min_free": "some"}, "'some' is not a size"),
        ({"index": 1}, "belongs to an embedded server"),
        ({"idle_s": 1}, "belongs to an embedded server"),
        ({"embedded": "/pool"}, "drop store"),
        ({"embedded": "/pool", "store": None, "index": -1}, "numbered from 0"),
        ({"embedded": "/pool", "store": None, "idle_s": 0}, "idle time"),
        ({"capasity": "1GB"}, "did you mean 'capacity'"),
        ({"colour": "red"}, "there is no setting 'colour'; there are listen"),
    ],
)
def test_refusals_say_what_to_do(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_settings(MINIMAL | changed)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_tls(host: str) -> None:
    listen = f"[{host}]:1" if ":" in host else f"{host}:1"
    assert from_settings(MINIMAL | {"listen": listen}).host == host


def test_other_addresses_listen_with_tls() -> None:
    config = from_settings(MINIMAL | {"listen": "0.0.0.0:1", "tls_cert": "/c.pem", "tls_key": "/k.pem"})
    assert config.tls == Tls(certificate=Path("/c.pem"), key=Path("/k.pem"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"host": "192.0.2.1"}, "without TLS"),
        ({"scrub_bytes_s": -1}, "a scrub rate of -1"),
        ({"min_free_bytes": -1}, "-1 bytes can't be left free"),
    ],
)
def test_the_class_checks_for_itself(changed: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 1,
        "store": Path("/s"),
        "capacity_bytes": 1,
        "under_stores": (("s3", "s3://"),),
        "token_file": Path("/t"),
    }
    with pytest.raises(ConfigurationError, match=message):
        ServerConfig(**(valid | changed))


@pytest.mark.parametrize("text", ["s3", "=s3://", "s3="])
def test_under_stores_are_name_and_uri(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=URI"):
        parse_under_stores([text])


def test_an_under_store_is_given_once() -> None:
    with pytest.raises(ConfigurationError, match="'s3' is given twice"):
        parse_under_stores(["s3=s3://a", "s3=s3://b"])


def test_an_uri_may_hold_an_equals_sign() -> None:
    assert parse_under_stores(["d=file:///a=b"]) == {"d": "file:///a=b"}


@pytest.mark.parametrize(
    ("mode", "is_warned"), [(0o600, False), (0o640, False), (0o604, True), (0o644, True)]
)
def test_of_a_private_key_that_everybody_may_read_the_log_warns(
    tmp_path: Path, mode: int, is_warned: bool
) -> None:
    """Of a group's, as Kubernetes and Debian's ssl-cert have it, not."""
    key = tmp_path / "key.pem"
    key.touch(mode)
    key.chmod(mode)
    config = from_settings(MINIMAL | {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(key)})
    warning = open_key(config)
    assert (warning is not None) is is_warned
    assert warning is None or f"{key} (mode {mode:04o})" in warning
    assert open_key(from_settings(MINIMAL)) is None


def test_ipv6_addresses() -> None:
    assert parse_listen("[::1]:7440") == ("::1", 7440)
    assert from_settings(MINIMAL | {"listen": "[::1]:7440"}).address == "[::1]:7440"


@pytest.mark.parametrize("text", ["/run/torchcache/server.sock:7440", "/:1", "//x:1", "[/x]:1", "/../x:1"])
def test_a_path_is_listened_on_only_where_it_is_called_a_socket(text: str) -> None:
    """As a host it would be one, of any form, without the port that was asked for."""
    with pytest.raises(ConfigurationError, match="is no address to listen on"):
        parse_listen(text)


@pytest.mark.parametrize("content", ["listen = ", "\xff"])
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"broken\.toml is not TOML"):
        read_toml(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml can't be read: No such file"):
        read_toml(tmp_path / "none.toml")
