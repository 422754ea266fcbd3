"""How each side knows that the other is still there.

A server that hangs, or a host that is gone, sends no reset: without a sign of life every call would wait for its
deadline. So clients ping (HTTP/2's own ping, which gRPC answers without the program) while a call is open and nothing
comes, and take a server that doesn't answer for gone. gRPC's servers count pings without data as abuse, the third in a
row ends the connection; Flight's can't be told otherwise, so whoever serves a data call sends something every
`HEARTBEAT_S`: a batch without rows, or an answer that is none yet.
"""

from __future__ import annotations

from typing import Final

CONNECT_S: Final = 2.0
"""What connecting may take, TLS and the peer's first word included."""

PING_S: Final = 2.0
"""How long nothing may come before a client asks."""

PING_TIMEOUT_S: Final = 3.0
"""What the answer may take. Of any ping, those by which gRPC measures a busy connection too: 1 s was too short where
64 streams and others' work shared two cores."""

HEARTBEAT_S: Final = 1.0

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),  # bounds the attempt, whatever its name says
    ("grpc.keepalive_time_ms", int(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),  # any number: by default it stops after two
)
"""Of clients, on both ports."""

CONTROL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (("grpc.http2.max_ping_strikes", 0),)
"""Of the control server: pings are no abuse, however many."""
