"""A clock that is wrong by CLOCK_IS_OFF_BY_S seconds, for every Python process that has this folder in its PYTHONPATH.

What counts seconds from then to now, `time.monotonic` and its like, is right. So is what gRPC sees, which hands it to C
code whose clock can't be changed from here.
"""

from __future__ import annotations

import os
import sys
import time

_OFF_BY_S = int(os.environ["CLOCK_IS_OFF_BY_S"])
_right = time.time


def _clock() -> float:
    caller = sys._getframe(1).f_globals.get("__name__", "")
    return _right() + (0 if caller.partition(".")[0] == "grpc" else _OFF_BY_S)


time.time = _clock
