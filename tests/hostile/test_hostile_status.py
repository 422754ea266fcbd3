"""What makes a server's status more than anybody can read. F35."""

from __future__ import annotations

import pytest

from tests.hostile.hostile_server import READ, HostileServer
from torchcache.wire.v1 import cache_pb2 as pb


@pytest.mark.hostile("exhaustion")
def test_datasets_without_number_leave_the_status_to_be_read(server: HostileServer) -> None:
    """A reader names the dataset that it reads, as many as it likes and as long as they may be."""
    for number in range(720):
        (server.source / f"of-its-own-{number}").write_bytes(b"x")
    server.note_surroundings()
    refs = [ref for ref in server.client.objects("file") if ref.key.startswith("of-its-own-")]
    reader = server.with_token(READ)
    try:
        for number, ref in enumerate(refs):
            asked = pb.ReadRequest(namespace=f"{number}-".ljust(6000, "n"), objects=[ref], timeout_s=20)
            asked.object.append(0)
            asked.offset.append(0)
            asked.length.append(-1)
            server.ticket(asked.SerializeToString(), reader)
        status = reader.status()
    finally:
        reader.close()
    assert status.namespaces_left_out > 0
    assert 300 < sum(len(one.name) == 6000 for one in status.namespaces) < 720
