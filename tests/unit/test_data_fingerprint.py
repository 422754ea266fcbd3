"""A dataset's fingerprint: the same for the same, another for another, refused where it would be a guess."""

from __future__ import annotations

import enum
import importlib
import math
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from tests.unit.fingerprinted import Child, Holder, Slotted, make_closed, make_local
from torchcache.data.fingerprint import fingerprint
from torchcache.errors import ConfigurationError


class Split(enum.Enum):
    TRAIN = "train"
    TEST = "test"


# Neighbours differ in as little as two values can.
DISTINCT: list[Any] = [
    None,
    True,
    1,
    1.0,
    2,
    "1",
    b"1",
    1j,
    math.inf,
    "",
    (),
    [],
    {},
    set(),
    frozenset(),
    [1],
    (1,),
    ["a", "b"],
    ["ab"],
    ["a", ["b"]],
    [("a", 1), ("b", 2)],
    [("a", 1, "b", 2)],
    [["a", 1], ["b", 2]],
    {"a": 1},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    OrderedDict(a=1),
    {"a"},
    {"a", "b"},
    Path("a"),
    Path("a/b"),
    Split.TRAIN,
    Split.TEST,
    range(3),
    range(4),
    slice(3),
    torch.float32,
    torch.bfloat16,
    np.dtype("f4"),
    torch.device("cpu"),
    torch.zeros(2),
    torch.zeros(3),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.ones(2),
    np.zeros(2),
    np.zeros(2, "f4"),
    np.ones(2),
    np.float32(1),
    np.array(["a"], object),
    np.array(["b"], object),
    np.zeros(1, [("a", "f4")]),
    np.zeros(1, [("b", "f4")]),
    Holder(),
    Child(),
    Holder(x=1),
    TensorDataset(torch.zeros(2)),
    Subset(TensorDataset(torch.zeros(2)), [0]),
    Subset(TensorDataset(torch.zeros(2)), [1]),
    ConcatDataset([TensorDataset(torch.zeros(2))]),
]


def test_different_attributes_have_different_fingerprints() -> None:
    found = [fingerprint(Holder(a=value)) for value in DISTINCT]
    assert len(set(found)) == len(DISTINCT)
    assert all(re.fullmatch("[0-9a-f]{32}", f) for f in found)


def test_names_classes_and_kinds_count() -> None:
    datasets = [
        Holder(a=1),
        Holder(b=1),
        Child(a=1),
        Slotted(1),
        Slotted(2),
        [1],
        (1,),
        np.ones(1),
        torch.ones(1),
    ]
    assert len({fingerprint(d) for d in datasets}) == len(datasets)


def test_the_order_in_which_attributes_were_set_does_not_count() -> None:
    assert fingerprint(Holder(a=1, b=2)) == fingerprint(Holder(b=2, a=1))


def test_layout_does_not_count() -> None:
    tensor, array = torch.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3)
    assert fingerprint(Holder(t=tensor)) == fingerprint(Holder(t=tensor.t().contiguous().t()))
    assert fingerprint(Holder(t=array)) == fingerprint(Holder(t=np.asfortranarray(array)))


def test_long_lists_are_read_to_the_end() -> None:
    paths = [(f"images/{i}.png", i % 10) for i in range(10_000)]
    changed = [*paths[:-1], ("images/other.png", 9)]
    assert fingerprint(Holder(samples=paths)) == fingerprint(Holder(samples=list(paths)))
    assert fingerprint(Holder(samples=paths)) != fingerprint(Holder(samples=changed))
    assert fingerprint(Holder(samples=paths)) != fingerprint(Holder(samples=paths[:-1]))


def test_the_source_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "class Base:\n    def __getitem__(self, i): return {}\nclass D(Base):\n    def __len__(self): return {}\n"
    found = []
    for number, (item, length) in enumerate([("i", 3), ("i", 3), ("-i", 3), ("i", 4)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "same_name.py").write_text(source.format(item, length))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "same_name", raising=False)
        found.append(fingerprint(importlib.import_module("same_name").D()))
    monkeypatch.delitem(sys.modules, "same_name")
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_it_is_the_same_in_another_process() -> None:
    """Hash seeds, interning and import order must not count."""
    program = (
        "from tests.unit.fingerprinted import Holder\nfrom torchcache.data.fingerprint import fingerprint\n"
        "print(fingerprint(Holder(s={'a', 'b', 'c'}, p=['x', 'y'], d={'k': (1, 2.5)}, n=None)))"
    )
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": "."}  # ours is another
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert (
        run.stdout == fingerprint(Holder(s={"c", "b", "a"}, p=["x", "y"], d={"k": (1, 2.5)}, n=None)) + "\n"
    )


def loop() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (lambda x: x, "dataset.a is a builtins.function"),
        ({"k": [1, object()]}, "dataset.a['k'][1] is a builtins.object"),
        (Holder(inner=open), "dataset.a.inner is a builtins.builtin_function_or_method"),
        (torch.nn.Linear(1, 1), "dataset.a is a torch.nn.modules.linear.Linear"),
        (torch.ones(1).to_sparse(), "dataset.a is a tensor that can't be looked into"),
        (np.array([object()]), "dataset.a[0] is a builtins.object"),
        (defaultdict(lambda: 0, a=print), "dataset.a['a'] is a"),
        ({1, Path}, "dataset.a{…} is a builtins.type"),
        (loop(), "lies too deep; does it contain itself?"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_not_be_looked_into_is_refused_by_name(value: Any, path: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(path)) as caught:
        fingerprint(Holder(a=value))
    assert "Pass name= to CachedDataset" in str(caught.value)


def test_a_class_that_depends_on_variables_around_it_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"dataset.shifted depends on n of the function around"):
        fingerprint(make_local(3)())
    assert fingerprint(make_closed()())  # super() alone is no such variable


def test_a_class_without_source_code_is_refused() -> None:
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec("class Typed:\n    def __len__(self): return 1\n    def __getitem__(self, i): return i", scope)
    with pytest.raises(ConfigurationError, match="dataset is a Typed, whose source code can't be found"):
        fingerprint(scope["Typed"]())
