"""A client's token file: who else may read it, and what that means. As ssh has it with keys.

One's own file that others may open is refused: `chmod 600` mends it. What somebody else put there, an administrator or
a mounted secret of Kubernetes, can't be mended by who reads it; such a file is used, with a warning if everybody on the
machine may read it.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Final, Literal

from torchcache.errors import ConfigurationError
from torchcache.tokens import first_token

Exposure = Literal["private", "readable", "refused"]

_log = logging.getLogger(__name__)
_warned: Final[set[Path]] = set()


def exposure(*, mode: int, owner: int, me: int, read_only: bool) -> Exposure:
    """What a file of this `mode` and `owner` is to user `me`; `read_only`: its file system is.

    "readable": everybody may read it, and `me` can't change that.
    """
    if not stat.S_ISREG(mode):  # a pipe, as <(...) of a shell
        return "private"
    if owner == me and not read_only:
        return "refused" if mode & 0o077 else "private"
    return "readable" if mode & 0o007 else "private"


def read_token(path: Path) -> str | None:
    """The first token of the file; None if it doesn't exist or holds none.

    Raises ConfigurationError if it can't be read, or is ours and open to others.
    """
    try:
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            read_only = bool(os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY)
            text = file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the token file {path} can't be read: {error}") from error
    mode = stat.S_IMODE(found.st_mode)
    exposed = exposure(mode=found.st_mode, owner=found.st_uid, me=os.geteuid(), read_only=read_only)
    if exposed == "refused":
        raise ConfigurationError(
            f"the token file {path} is open to others (mode {mode:04o}), who could use the pool as you: chmod 600 it"
        )
    if exposed == "readable" and path not in _warned:
        _warned.add(path)
        _log.warning(
            "everybody on this machine may read the token file %s (mode %04o, of uid %d): its owner should give it "
            "mode 0600, or, as a secret of Kubernetes, defaultMode 0440",
            path,
            mode,
            found.st_uid,
        )
    return first_token(text)
