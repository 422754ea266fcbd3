"""The control client: one gRPC call to one server, its errors ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc

from torchcache.addresses import UNIX
from torchcache.errors import ConfigurationError
from torchcache.lanes.access import Access
from torchcache.lanes.connections import Connections, connections
from torchcache.lanes.flight import CHANNEL_OPTIONS, remaining, without_frames
from torchcache.unix_sockets import check_socket
from torchcache.wire.request_ids import HEADER, new_request_id
from torchcache.wire.status import error_from_status
from torchcache.wire.v1 import cache_pb2_grpc

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Of a reply. Requests are bounded by the server."""


class _Channel:
    """A gRPC channel with its stub."""

    def __init__(self, address: str, access: Access) -> None:
        options: list[tuple[str, int | str]] = [
            *CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        credentials = None if address.startswith(UNIX) else access.channel_credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            if (name := access.server_name()) is not None:
                options.append(("grpc.ssl_target_name_override", name))
            self._channel = grpc.secure_channel(address, credentials, options=options)
        stub: Any = cache_pb2_grpc.ControlStub  # generated without types
        self.stub = stub(self._channel)

    def close(self) -> None:
        self._channel.close()


class ControlClient:
    """Calls of one server's control service."""

    def __init__(self, address: str, access: Access, registry: Connections = connections) -> None:
        self.address = address
        self._access = access
        self._connections = registry
        self._key = ("control", address, access)

    def call(self, method: str, request: Any, *, deadline: float) -> Any:
        """The reply of `method` of the Control service. Raises the server's error, or what ended the call.

        The error names the call's request id.
        """
        bearer, request_id = self._access.bearer(), new_request_id()
        metadata = [(HEADER, request_id), *([("authorization", bearer)] if bearer else [])]
        timeout_s = remaining(deadline, self.address)
        with self._connections.call():
            channel: _Channel | None = None
            stub: Callable[..., Any] | None = None
            try:
                if self.address.startswith(UNIX):
                    check_socket(self.address.removeprefix(UNIX))
                channel = self._connections.channel(self._key, lambda: _Channel(self.address, self._access))
                stub = getattr(channel.stub, method)
                return stub(request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                if bearer is None and error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    raise ConfigurationError(
                        self._access.without_token(), server=self.address, request_id=request_id
                    ) from without_frames(error)
                # Under no name: a frame that its own error refers to would live until the next collection.
                raise error_from_status(
                    error.code(), error.details(), server=self.address, request_id=request_id
                ) from without_frames(error)
            finally:
                del channel, stub

    def close(self) -> None:
        """Closes this process's connection; the next call opens another."""
        self._connections.drop(self._key)
