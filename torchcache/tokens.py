"""The file of tokens: what each says who may do what, one a line, `read TOKEN`; a token alone on its line is `admin`.

Servers accept every token of their file. A client sends the first of its own, which as a rule has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from torchcache.errors import ConfigurationError

MIN_CHARACTERS: Final = 16
MAX_CHARACTERS: Final = 4096
MAX_TOKENS: Final = 1000


class Scope(IntEnum):
    """What a token allows. Each includes those before it."""

    READ = 1
    """To read and list, also what must be fetched first, and to see the servers' state."""

    WRITE = 2
    """To store samples, objects and checkpoints, and to delete them."""

    ADMIN = 3
    """To change what is kept and what goes, for everybody."""

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class ScopedToken:
    """A secret, and what it allows."""

    scope: Scope
    secret: str = field(repr=False)


_SCOPES: Final = {str(scope): scope for scope in Scope}


def parse_tokens(text: str) -> tuple[ScopedToken, ...]:
    """The tokens in the text of a file, in its order. Empty lines and such as begin with "# " are passed over.

    Raises ConfigurationError, which never shows the text.
    """
    tokens = tuple(map(_parsed, _lines(text)))
    if not tokens:
        raise ConfigurationError(_NO_TOKEN)
    if len(tokens) > MAX_TOKENS:
        raise ConfigurationError(f"{len(tokens)} tokens: {MAX_TOKENS} are allowed")
    if len({token.secret for token in tokens}) < len(tokens):
        raise ConfigurationError("a token stands there twice: each has one scope")
    return tokens


def first_token(text: str) -> str | None:
    """The secret that a client with this file sends; None if there is none. What is wrong with it, servers say."""
    return next((line.split()[-1] for line in _lines(text)), None)


def format_tokens(tokens: Sequence[ScopedToken]) -> str:
    """The text of a file that `parse_tokens` gives back."""
    lines = [t.secret if t.scope is Scope.ADMIN else f"{t.scope} {t.secret}" for t in tokens]
    return "".join(f"{line}\n" for line in lines)


def _lines(text: str) -> list[str]:
    lines = map(str.strip, text.splitlines())
    return [line for line in lines if line and not line.startswith("# ")]


_NO_TOKEN: Final = (
    f"it holds no token: a line of {MIN_CHARACTERS} printable characters or more, behind {', '.join(_SCOPES)} and a "
    "space if it isn't for everything"
)


def _parsed(line: str) -> ScopedToken:
    word, space, secret = line.partition(" ")
    if not space:
        word, secret = str(Scope.ADMIN), line
    secret = secret.strip()
    fits = MIN_CHARACTERS <= len(secret) <= MAX_CHARACTERS and secret.isascii() and secret.isprintable()
    if word not in _SCOPES or not fits or " " in secret:
        raise ConfigurationError(_NO_TOKEN)
    return ScopedToken(_SCOPES[word], secret)
