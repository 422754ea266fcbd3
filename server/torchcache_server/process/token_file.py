"""The tokens' file: made if it is missing, refused if others could read or have written it."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError
from torchcache.tokens import ScopedToken, parse_tokens

MAX_FILE_BYTES: Final = 1 << 20


def read_or_create_tokens(path: Path) -> tuple[ScopedToken, ...]:
    """The tokens in `path`; a new one is written there, for everything, mode 0600, if there is no such file.

    Raises ConfigurationError if the file is a link, belongs to another user, is open to others, or holds anything but
    tokens.
    """
    try:
        return read_tokens(path)
    except FileNotFoundError:
        _create(path, secrets.token_urlsafe(32))
        return read_tokens(path)  # another server may have been faster: its token counts


def read_tokens(path: Path) -> tuple[ScopedToken, ...]:
    """The tokens in `path`. Raises FileNotFoundError, and ConfigurationError as `read_or_create_tokens`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigurationError(f"the token file {path} can't be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"the token file {path} is not a regular file")
        if found.st_uid != os.geteuid():
            raise ConfigurationError(f"the token file {path} belongs to another user (uid {found.st_uid})")
        if found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise ConfigurationError(
                f"the token file {path} is open to others (mode {mode:04o}): chmod 600 it"
            )
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(f"the token file {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        return parse_tokens(content.decode(errors="replace"))
    except ConfigurationError as error:
        raise ConfigurationError(f"the token file {path} can't be used: {error.message}") from None


def _create(path: Path, token: str) -> None:
    """Atomic, and never over an existing file: a link of a file that is complete."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(token + "\n")
            os.link(temporary, path)
        finally:
            temporary.unlink()
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigurationError(f"the token file {path} can't be made: {error.strerror}") from None
