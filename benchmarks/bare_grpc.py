"""What grpcio gives: one stream of raw bytes, a message a record, no protobuf. Run as a script: the server."""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.processes import server

_OPTIONS: Final = (("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0))
MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Records above this come in several messages."""


@dataclass(frozen=True)
class GrpcClient:
    """A channel; `size` bytes a record."""

    call: Any
    size: int
    pid: int

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> int:
        """Asks for all records at once and fills one buffer each; returns the bytes."""
        stream = self.call(struct.pack(f"<{len(numbers)}I", *numbers))
        done = 0
        for _, buffer in zip(numbers, into, strict=False):
            at = 0
            while at < self.size:
                message = next(stream)
                buffer[at : at + len(message)] = message
                at += len(message)
            done += at
        return done


@contextmanager
def grpc_client(path: Path, size: int) -> Iterator[GrpcClient]:
    """A server process for the flat file at `path`, and a channel to it."""
    with (
        server("benchmarks.bare_grpc", path, size) as child,
        grpc.insecure_channel(f"127.0.0.1:{child.port}", _OPTIONS) as channel,
    ):
        yield GrpcClient(channel.unary_stream("/bare/Read"), size, child.pid)


def _main() -> None:
    size = int(sys.argv[2])
    with open(sys.argv[1], "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def read(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        for number in struct.unpack(f"<{len(request) // 4}I", request):
            end = (number + 1) * size
            for at in range(number * size, end, MESSAGE_BYTES):
                yield bytes(data[at : min(end, at + MESSAGE_BYTES)])

    handler = grpc.method_handlers_generic_handler(
        "bare", {"Read": grpc.unary_stream_rpc_method_handler(read)}
    )
    serving = grpc.server(ThreadPoolExecutor(2), [handler], options=_OPTIONS)
    print(serving.add_insecure_port("127.0.0.1:0"), flush=True)
    serving.start()
    serving.wait_for_termination()


if __name__ == "__main__":
    _main()
