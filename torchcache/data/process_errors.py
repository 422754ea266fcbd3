"""Which errors of a user's dataset are its process's matter, or its machine's, and not that of one sample.

To leave the sample out would be wrong: another is read a moment later by the same process, and fares no better, so that
an epoch would quietly be one of whatever came between.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Final

import torch

from torchcache.errors import (
    IntegrityError,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
    UnsupportedSample,
)

_ERRNOS: Final = frozenset(
    {
        # no room: for open files, memory, processes, on the disk
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOSPC,
        errno.EDQUOT,
        # a disk, or a mounted file system's server, that fails
        errno.EIO,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        # the network
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)

_KINDS: Final = (MemoryError, TimeoutError, ConnectionError, socket.gaierror, torch.OutOfMemoryError)

_OF_SAMPLES: Final = (IntegrityError, ObjectChanged, ObjectNotFound, UnsupportedSample)

_TEXTS: Final = ("DefaultCPUAllocator: ", "can't start new thread")
"""In RuntimeErrors that have no type of their own: torch is out of memory, Python out of threads."""


def is_of_one_sample(error: Exception, handled: BaseException | None) -> bool:
    """Whether it says something of one sample: not of the process, of the pool, or of how it was asked.

    Nor may one of those that it was raised from or behind, as a traceback shows them: libraries wrap what the system
    says. `handled` is what was being handled already when the sample was asked for, and so caused nothing.
    """
    for one in _chain(error, handled):
        if isinstance(one, TorchCacheError):
            return isinstance(one, _OF_SAMPLES)
        if _is_of_the_process(one):
            return False
    return True


def _is_of_the_process(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    if type(error) is RuntimeError:
        return any(text in str(error) for text in _TEXTS)
    return isinstance(error, _KINDS)


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and one is not handled and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ if one.__cause__ or one.__suppress_context__ else one.__context__
