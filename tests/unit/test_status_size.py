"""What of a server's status fits into a message, and what goes first."""

from __future__ import annotations

from torchcache_server.service.status_size import by_weight, fitting
from torchcache_server.store import NamespaceUsage, Policy

from torchcache.wire.v1 import cache_pb2 as pb


def test_as_many_as_fit_and_a_count_of_the_others() -> None:
    def told(size: int) -> pb.NamespaceStatus:
        return pb.NamespaceStatus(name="n" * size)

    sizes = [100] * 50
    found, left_out = fitting(told, sizes, 2000)
    assert 10 < len(found) < 20
    assert len(found) + left_out == 50
    assert pb.StatusReply(namespaces=found).ByteSize() <= 2000
    assert fitting(told, sizes, 20_000) == (list(map(told, sizes)), 0)
    assert fitting(told, [3000, 1], 2000) == ([], 2)
    assert fitting(told, [], 2000) == ([], 0)


def test_what_a_reader_makes_comes_after_checkpoints_and_what_has_a_policy() -> None:
    small = NamespaceUsage("s3://b/small", 1, 1, False)
    large = NamespaceUsage("s3://b/large", 9, 1, False)
    pinned = NamespaceUsage("s3://b/pinned", 0, 0, False, Policy(pinned=True))
    saved = NamespaceUsage("save:s3/b/run@1", 2, 1, True)
    assert by_weight([small, large, pinned, saved]) == [saved, pinned, large, small]
