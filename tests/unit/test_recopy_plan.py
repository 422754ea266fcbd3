"""When a save that waits for its upload wants another copy."""

from __future__ import annotations

from torchcache_server.cache.recopy_plan import begin, is_due, is_short

GRACE_S = 30.0
SIZE = 1000


def test_a_young_save_or_one_without_copies_is_left_alone() -> None:
    assert not is_due(begin(2, SIZE, 100.0), SIZE, now_s=129.0, grace_s=GRACE_S)
    assert is_due(begin(2, SIZE, 100.0), SIZE, now_s=130.0, grace_s=GRACE_S)
    assert not is_due(begin(1, SIZE, 100.0), SIZE, now_s=500.0, grace_s=GRACE_S)


def test_an_upload_that_ends_soon_is_waited_for() -> None:
    watch = begin(2, SIZE, 100.0)
    # 10 bytes a second: 700 take 70 s, 300 take 30.
    assert is_due(watch, 700, now_s=130.0, grace_s=GRACE_S)
    assert not is_due(watch, 300, now_s=170.0, grace_s=GRACE_S)
    assert is_due(watch, 300, now_s=400.0, grace_s=GRACE_S)  # it got stuck
    assert is_due(watch, SIZE + 1, now_s=400.0, grace_s=GRACE_S)  # uploaded shards were changed by somebody


def test_too_few_are_too_few_only_after_the_grace() -> None:
    watch = begin(3, SIZE, 0.0)
    assert watch.held == 3
    watch = watch.found(2, 100.0)
    assert not is_short(watch, now_s=129.0, grace_s=GRACE_S)
    watch = watch.found(1, 120.0)
    assert is_short(watch, now_s=130.0, grace_s=GRACE_S)
    watch = watch.found(3, 140.0)
    assert not is_short(watch, now_s=500.0, grace_s=GRACE_S)
    assert not is_short(watch.found(2, 500.0), now_s=529.0, grace_s=GRACE_S)
