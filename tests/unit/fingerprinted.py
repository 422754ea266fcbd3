"""Datasets of many kinds, for the tests of fingerprints."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class Holder(Dataset[Any]):
    """Holds anything as its attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return index


class Child(Holder):
    pass


class Slotted:
    __slots__ = ("a", "unset")

    def __init__(self, a: Any) -> None:
        self.a = a

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return self.a


def make_local(n: int) -> type:
    class Local(Holder):
        def __init__(self) -> None:
            super().__init__()

        @property
        def shifted(self) -> int:
            return n

    return Local


def make_closed() -> type:
    class Closed(Holder):
        def __init__(self) -> None:
            super().__init__(x=1)

    return Closed
