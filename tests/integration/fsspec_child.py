"""What child processes of test_fsspec run: a module of its own, so that a spawned child imports little."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection


def read_in_child(pickled: bytes, path: str, answer: Connection) -> None:
    answer.send(pickle.loads(pickled).cat(path))
