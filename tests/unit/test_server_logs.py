"""The server's log lines: their fields, and what must never be in one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.process import logs
from torchcache_server.process.logs import (
    JsonFormatter,
    Secrets,
    TextFormatter,
    check_format,
    check_level,
    hide_credentials,
    peer,
)
from torchcache_server.service.request_log import Request, serving

from torchcache.errors import ConfigurationError

REQUEST = Request("abc", "do_get", "ipv6:%5B::1%5D:5", "s3://bucket/a\nb")


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "secrets", Secrets())
    yield


def record(message: str, *arguments: object, trace: Any = None) -> logging.LogRecord:
    made = logging.LogRecord("torchcache_server.x", logging.INFO, "x.py", 1, message, arguments, trace)
    made.created, made.msecs = 1_000_000_000.25, 250.0
    return made


def failure(message: str) -> Any:
    try:
        raise OSError(message)
    except OSError:
        return sys.exc_info()


def test_json_has_the_fields() -> None:
    formatter = JsonFormatter()
    assert json.loads(formatter.format(record("started"))) == {
        "ts": "2001-09-09T01:46:40.250Z",
        "level": "INFO",
        "logger": "torchcache_server.x",
        "message": "started",
    }
    formatter.server = "id"
    with serving(REQUEST):
        line = formatter.format(record("%s is %d", "a\nb", 7, trace=failure("no")))
    assert "\n" not in line
    said = json.loads(line)
    assert said.pop("trace").endswith("OSError: no")
    assert said["message"] == "a\nb is 7"
    about = {name: said[name] for name in ("server", "request_id", "call", "peer", "namespace")}
    assert about == {
        "server": "id",
        "request_id": "abc",
        "call": "do_get",
        "peer": "[::1]:5",
        "namespace": "s3://bucket/a\nb",
    }


def test_text_says_the_same_to_people() -> None:
    with serving(REQUEST):
        lines = TextFormatter().format(record("it %s", "failed", trace=failure("x\ny"))).splitlines()
    assert lines[0] == (
        "2001-09-09T01:46:40.250Z INFO torchcache_server.x: it failed "
        r"[request_id=abc call=do_get peer=[::1]:5 namespace=s3://bucket/a\nb]"
    )
    assert len(lines) > 2
    assert all(line.startswith("    ") for line in lines[1:])


@given(st.text(st.characters(), max_size=60))
def test_nothing_said_forges_a_line(said: str) -> None:
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record("%s", said))
        assert line.splitlines() == [line]
        assert line.isprintable()
        line.encode()


def test_a_wrong_call_of_the_log_is_a_line_too() -> None:
    assert "'%d of them'" in TextFormatter().format(record("%d of them", "x"))


SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_no_line_holds_a_secret(formatter: logs.LogFormatter) -> None:
    hide_credentials(
        {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": "short"}
    )
    about = Request("abc", "do_get", "", f"s3://{SECRET}")
    with serving(about):
        line = formatter.format(record("key AKIAEXAMPLE, %s", SECRET, trace=failure(f"{SECRET} short")))
    assert SECRET not in line
    assert line.count("[hidden]") == 3
    assert "AKIAEXAMPLE" in line  # no secret, and it says which key is wrong


@pytest.mark.parametrize(
    "text",
    [
        "authorization: Bearer {}",
        "Authorization: AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host, Signature={}",
        "{{'x-amz-security-token': '{}'}}",
        "https://b/k?X-Amz-Signature={}&x=1",
        'aws_secret_access_key = "{}"',
    ],
)
def test_what_stands_where_credentials_do_is_hidden(text: str) -> None:
    line = TextFormatter().format(record("%s", text.format("c4n4ryC4N4RY")))
    assert "c4n4ry" not in line
    assert "[hidden]" in line


def test_settings_that_there_are_not() -> None:
    assert (check_format("json"), check_level("debug")) == ("json", "debug")
    with pytest.raises(ConfigurationError, match="text or json"):
        check_format("xml")
    with pytest.raises(ConfigurationError, match="debug, info"):
        check_level("loud")


def test_peers_as_people_write_them() -> None:
    assert peer("ipv4:10.0.0.1:7") == "10.0.0.1:7"
    assert peer("unix:") == "unix:"
