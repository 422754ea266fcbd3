"""How long a call may take, by what its caller allows."""

from __future__ import annotations

import time

import grpc

from .requests import DEFAULT_CALL_S, MAX_CALL_S


def remaining_s(context: grpc.ServicerContext) -> float:
    remaining_s: float | None = context.time_remaining()
    return DEFAULT_CALL_S if remaining_s is None else min(remaining_s, MAX_CALL_S)


def deadline_of(context: grpc.ServicerContext) -> float:
    return time.monotonic() + remaining_s(context)
