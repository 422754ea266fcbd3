"""The server's log, on stderr: lines of text, or of JSON, a line a record, each with the request that it is about.

What came from outside can't forge a line, and nothing that looks like a credential is in one. Libraries speak only from
WARNING on: at DEBUG, botocore would write down what it signs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import unquote

from torchcache import environment
from torchcache.errors import ConfigurationError
from torchcache_server.service.request_log import current

LogFormat: TypeAlias = Literal["text", "json"]
FORMATS: Final[tuple[LogFormat, ...]] = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
DEFAULT_FORMAT: Final[LogFormat] = "text"
DEFAULT_LEVEL: Final = "info"
OURS: Final = ("torchcache", "torchcache_server")

MAX_CHARACTERS: Final = 16_384
"""Of a message, and of a trace."""

MIN_SECRET_CHARACTERS: Final = 8
"""A shorter one stands in too many words."""

_HIDDEN: Final = "[hidden]"
_CREDENTIALS: Final = re.compile(
    r"(?i)(\bbearer\s+|\bsignature=|\bx-amz-security-token['\"]?\s*[:=]\s*['\"]?|secret_?access_?key['\"]?\s*[:=]\s*['\"]?)"
    r"[^\s,;&'\"]+"
)


class Secrets:
    """Texts that no line may hold. Thread-safe."""

    def __init__(self) -> None:
        self._texts: frozenset[str] = frozenset()

    def add(self, texts: Iterable[str]) -> None:
        """From now on."""
        self._texts |= {text for text in texts if len(text) >= MIN_SECRET_CHARACTERS}

    def hide(self, text: str) -> str:
        """The text without them, and without what stands where credentials do."""
        for secret in self._texts:
            text = text.replace(secret, _HIDDEN)
        return _CREDENTIALS.sub(lambda found: found[1] + _HIDDEN, text)


secrets: Final = Secrets()
"""Of this process."""


class LogFormatter(logging.Formatter):
    """What a record says, as fields: ts, level, logger, message, and where known server, request_id, call, peer,
    namespace, trace. `server` is the server's id, once it has one."""

    server: str | None = None

    def fields(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        """In their order; secrets are hidden, and what is long is cut."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        yield "ts", f"{moment}.{int(record.msecs):03d}Z"
        yield "level", record.levelname
        yield "logger", record.name
        yield "message", _shown(_message(record))
        if self.server is not None:
            yield "server", self.server
        if (request := current.get()) is not None:
            told = {"request_id": request.id, "call": request.call, "peer": peer(request.peer)}
            yield from ((name, _shown(text)) for name, text in told.items() if text)
            if request.namespace:
                yield "namespace", _shown(request.namespace)
        if record.exc_info and record.exc_info[0] is not None:
            yield "trace", _shown("".join(traceback.format_exception(*record.exc_info)).rstrip())


class JsonFormatter(LogFormatter):
    """One JSON object a line, all ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(dict(self.fields(record)))


class TextFormatter(LogFormatter):
    """For people: what a request's line is about stands in brackets behind it, a trace on lines below, indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(self.fields(record))
        line = f"{fields['ts']} {fields['level']} {fields['logger']}: {_one_line(fields['message'])}"
        names = ("request_id", "call", "peer", "namespace")
        if about := " ".join(f"{name}={_one_line(fields[name])}" for name in names if name in fields):
            line += f" [{about}]"
        trace = fields.get("trace", "").splitlines()
        return "\n    ".join([line, *map(_one_line, trace)])


def configure(form: LogFormat, level: str) -> LogFormatter:
    """Sends this process's log to stderr, and there only. What no thread catches, and warnings, go there too."""
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)
    threading.excepthook = _log_uncaught
    logging.raiseExceptions = False  # a line that can't be written must not be the end of what it tells of
    hide_credentials(environment.credentials())
    return formatter


def hide_credentials(variables: Mapping[str, str]) -> None:
    """Storage's, by the names of their variables. The key's id is no secret, and says which key is wrong."""
    secrets.add(value for name, value in variables.items() if name != "AWS_ACCESS_KEY_ID")


def check_format(text: str) -> LogFormat:
    """Raises ConfigurationError."""
    for form in FORMATS:
        if text == form:
            return form
    raise ConfigurationError(f"there is no log format {text!r}: give {' or '.join(FORMATS)}")


def check_level(text: str) -> str:
    """Raises ConfigurationError."""
    if text not in LEVELS:
        raise ConfigurationError(f"there is no log level {text!r}: give one of {', '.join(LEVELS)}")
    return text


def peer(told: str) -> str:
    """gRPC's "ipv4:1.2.3.4:5" or "ipv6:%5B::1%5D:5" as host:port."""
    return unquote(told.removeprefix("ipv4:").removeprefix("ipv6:"))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - a wrong line is worth more than none
        return f"{record.msg!r} ({type(error).__name__} while it was written)"


def _shown(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}...{text[-half:]}"
    return secrets.hide(text)


def _one_line(text: str) -> str:
    """What would end a line, move a terminal's cursor or turn its writing around, as an escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _log_uncaught(told: Any) -> None:
    if told.exc_type is not SystemExit:
        name = told.thread.name if told.thread is not None else "?"
        trace = (told.exc_type, told.exc_value, told.exc_traceback)
        logging.getLogger(__name__).error(
            "the thread %s ended by an error nobody foresaw", name, exc_info=trace
        )
