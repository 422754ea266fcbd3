"""Lists by key, sorted and compared a part at a time: the same as if it were done at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_data_manifest import objects
from torchcache.data import key_order, manifest
from torchcache.data.key_order import by_key
from torchcache.data.listing import changes
from torchcache.data.manifest import Manifest
from torchcache.errors import IntegrityError

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_VERSIONS = st.dictionaries(_TEXT, st.sampled_from("vw"), max_size=40)


@pytest.fixture(params=[1000, 8], ids=["at once", "in parts"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of seven rows, and parts of so many."""
    monkeypatch.setattr(manifest, "BATCH_ROWS", 7)
    monkeypatch.setattr(key_order, "BATCH_ROWS", 7)
    monkeypatch.setattr(key_order, "PART_ROWS", request.param)


def by_key_of(rows: list[tuple[str, str, int]], folder: Path) -> Manifest:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    found = Manifest.of_batches("s3", by_key(Manifest.write("s3", objects(rows), folder), own), folder)
    assert not [*own.iterdir()]
    return found


@given(st.dictionaries(_TEXT, _TEXT, max_size=60), st.randoms(use_true_random=False))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_listing_in_any_order_becomes_the_same_list(
    tmp_path: Path, small: None, versions: dict[str, str], chance: random.Random
) -> None:
    """Also where the rows are several batches, on either side."""
    rows = [(key, version, number) for number, (key, version) in enumerate(versions.items())]
    in_order = sorted(objects(rows), key=lambda object: object.id.key)
    chance.shuffle(rows)
    found = by_key_of(rows, tmp_path)
    assert [found[i] for i in range(len(found))] == in_order
    assert found.digest == Manifest.write("s3", in_order, tmp_path).digest


@given(st.lists(_TEXT, min_size=1, max_size=60, unique=True), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_key_that_comes_twice_is_found_wherever_it_is(
    tmp_path: Path, small: None, keys: list[str], data: st.DataObject
) -> None:
    rows = [(key, "v", 1) for key in keys]
    twice = data.draw(st.sampled_from(keys))
    rows.insert(data.draw(st.integers(0, len(rows))), (twice, "w", 1))
    (tmp_path / "own").mkdir(exist_ok=True)
    with pytest.raises(IntegrityError) as refused:
        by_key_of(rows, tmp_path)
    assert f"{twice!r} twice" in str(refused.value)
    for left in (tmp_path / "own").iterdir():
        left.unlink()


def test_parts_are_cut_where_they_are_sorted(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part is anything like the whole: with an order that is unlike that of the keys, too."""
    lengths: list[int] = []
    parts = key_order._parts

    def counted(manifest: Manifest, folder: Path) -> Iterator[pa.Table]:
        for part in parts(manifest, folder):
            lengths.append(len(part))
            yield part

    monkeypatch.setattr(key_order, "_parts", counted)
    rows = [(f"{number:04d}", "v", number) for number in range(700)]
    random.Random(1).shuffle(rows)
    found = by_key_of(rows, tmp_path)
    assert sum(lengths) == len(found) == 700
    if key_order.PART_ROWS < 700:
        assert len(lengths) == -(-700 // key_order.PART_ROWS)
        assert max(lengths) <= 4 * key_order.PART_ROWS


@given(_VERSIONS, _VERSIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_has_changed_is_what_has_changed(
    tmp_path: Path, small: None, before: dict[str, str], after: dict[str, str]
) -> None:
    old, new = (
        Manifest.write(
            "s3", objects([("b/" + key, version, 1) for key, version in sorted(rows.items())]), tmp_path
        )
        for rows in (before, after)
    )
    found = changes(old, new, "b/")
    assert found.added == tuple(sorted(after.keys() - before.keys()))
    assert found.removed == tuple(sorted(before.keys() - after.keys()))
    assert found.changed == tuple(k for k in sorted(before.keys() & after.keys()) if before[k] != after[k])


def test_no_window_is_more_than_a_batch(tmp_path: Path, small: None) -> None:
    """Whatever was put between: so what is compared at a time doesn't grow."""
    few = Manifest.write("s3", objects([(f"{number:04d}", "v", 1) for number in (5, 995)]), tmp_path)
    many = Manifest.write("s3", objects([(f"{number:04d}", "v", 1) for number in range(1000)]), tmp_path)
    for one, other in ((few, many), (many, few)):
        windows = [*key_order.windows(one, other)]
        for side, listed in enumerate((one, other)):
            rows = [row for window in windows for row in range(len(listed))[window[side]]]
            assert rows == [*range(len(listed))]
            assert max(window[side].stop - window[side].start for window in windows) <= 7
