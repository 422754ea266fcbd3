"""The token's file: made if it is missing, refused if others could read or have written it."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from torchcache.errors import ConfigurationError


def read_or_create_token(path: Path) -> str:
    """The token in `path`; a new one is written there, mode 0600, if there is no such file.

    Raises ConfigurationError if the file is a link, belongs to another user, is open to others, or holds no token.
    """
    try:
        return read_token(path)
    except FileNotFoundError:
        _create(path, secrets.token_urlsafe(32))
        return read_token(path)  # another server may have been faster: its token counts


def read_token(path: Path) -> str:
    """The token in `path`. Raises FileNotFoundError, and ConfigurationError as `read_or_create_token`."""
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
        token = file.read(4097).decode(errors="replace").strip()
    if not 16 <= len(token) <= 4096 or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"the token file {path} holds no token: one line of 16 printable characters or more"
        )
    return token


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
