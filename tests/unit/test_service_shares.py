"""What reads of one dataset may have on its way, beside those of others."""

from __future__ import annotations

from torchcache_server.service.ahead_shares import AheadShares

from torchcache.model import CHUNK_BYTES

MUCH = 1000 * CHUNK_BYTES


def test_alone_three_quarters_and_of_two_three_sevenths() -> None:
    shares = AheadShares(84 * CHUNK_BYTES)
    one, other = shares.begin("a"), shares.begin("b")
    while (more := min(one.left(MUCH), CHUNK_BYTES)) > 0:
        one.bytes += more
    assert one.bytes == 63 * CHUNK_BYTES
    while (more := min(other.left(MUCH), CHUNK_BYTES)) > 0:
        other.bytes += more
    assert other.bytes == 16 * CHUNK_BYTES
    one.bytes = 36 * CHUNK_BYTES
    other.bytes = 36 * CHUNK_BYTES
    assert (one.left(MUCH), other.left(MUCH)) == (0, 0)
    other.bytes -= CHUNK_BYTES
    assert (one.left(MUCH), other.left(MUCH)) == (3 * CHUNK_BYTES, 4 * CHUNK_BYTES)


def test_reads_of_one_dataset_share_and_each_has_a_chunk() -> None:
    shares = AheadShares(8 * CHUNK_BYTES)
    reads = [shares.begin("a") for _ in range(3)]
    reads[0].bytes = 6 * CHUNK_BYTES
    assert [read.left(MUCH) for read in reads] == [0, CHUNK_BYTES, CHUNK_BYTES]
    reads[0].bytes = 0
    assert [read.left(2 * CHUNK_BYTES) for read in reads] == [2 * CHUNK_BYTES] * 3
    assert reads[0].left(10) == 10


def test_who_is_done_has_nothing() -> None:
    shares = AheadShares(8 * CHUNK_BYTES)
    done, other = shares.begin("a"), shares.begin("b")
    done.bytes = 6 * CHUNK_BYTES
    assert other.left(MUCH) == 6 * CHUNK_BYTES
    done.close()
    assert other.left(MUCH) == 24 * CHUNK_BYTES
