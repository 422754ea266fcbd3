"""Whole numbers in a mapped file: the same in each process, and never those of another file."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from torchcache.data.mapped_ints import MappedInts
from torchcache.errors import ConfigurationError, IntegrityError, ObjectNotFound

VALUES = np.random.default_rng(1).integers(-(1 << 60), 1 << 60, 100_000)


def test_what_is_pickled_is_where_they_lie(tmp_path: Path) -> None:
    written = MappedInts.write(VALUES, tmp_path)
    pickled = pickle.dumps(written)
    assert len(pickled) < 1000
    found = pickle.loads(pickled).array()
    assert found.dtype == np.int64
    assert not found.flags.owndata and not found.flags.writeable
    np.testing.assert_array_equal(found, VALUES)
    written.array()
    assert len(pickle.dumps(written)) == len(pickled)  # opened or not
    assert MappedInts.write(VALUES, tmp_path).path == written.path  # once for all ranks
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".arrow"]
    assert len(MappedInts.write(VALUES[:0], tmp_path).array()) == 0


def test_a_worker_that_opens_them_imports_nothing_for_it(tmp_path: Path) -> None:
    """Pandas above all, which Arrow's own `to_numpy` imports where it is installed."""
    written = MappedInts.write(VALUES, tmp_path)
    code = (
        "import pickle, sys\n"
        "from torchcache.data.mapped_ints import MappedInts\n"
        f"ints, before = pickle.loads({pickle.dumps(written)!r}), set(sys.modules)\n"
        "ints.array()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(' '.join(new & {'pandas', 'torch'}) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_is_damaged_or_gone(tmp_path: Path) -> None:
    written = MappedInts.write(VALUES, tmp_path)
    data = bytearray(written.path.read_bytes())
    data[len(data) // 2] ^= 1
    written.path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"list of records, .* is damaged"):
        written.array()
    written.path.unlink()
    with pytest.raises(ObjectNotFound, match=r"list of records, .* is gone, .* create the dataset again"):
        written.array()


def test_a_file_in_use_is_kept(tmp_path: Path) -> None:
    """What nobody has opened for a month goes when another is written."""
    written = MappedInts.write(VALUES, tmp_path)
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(written.path, (long_ago, long_ago))
    written.array()
    MappedInts.write(VALUES[:9], tmp_path)
    assert written.path.exists()
    os.utime(written.path, (long_ago, long_ago))
    MappedInts.write(VALUES[:8], tmp_path)
    assert not written.path.exists()
    np.testing.assert_array_equal(written.array(), VALUES)  # mapped it stays


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="TORCHCACHE_HOME"):
        MappedInts.write(VALUES, tmp_path / "file" / "folder")
