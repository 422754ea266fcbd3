"""The memory that states are staged in, and how it is known that nobody reads it any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchcache.checkpoint.host_memory import new_tensor
from torchcache.checkpoint.stager_plan import Plan, Wanted


class Staged(dict[str, Any]):
    """A staged state. A dict that can be watched: whoever saves it holds it until the save is done.

    What isn't in shared memory goes to another process as a copy: torch would swap the memory under all its tensors.
    So do DTensors: torch crashes where several that it sends lie in one storage.
    """

    def __init__(self, content: Mapping[str, Any], *, is_shared: bool) -> None:
        super().__init__(content)
        self._is_shared = is_shared
        self._original: Staged | None = None

    def __copy__(self) -> Staged:
        """Of the same tensors, as of any dict. It holds the memory as this one does."""
        copied = Staged(self, is_shared=self._is_shared)
        copied._original = self
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        plan = Plan(self)
        if self._is_shared and not plan.has_dtensors:
            return (dict, (dict(self),))
        return (dict, (plan.carry_out(_apart),))


def _apart(wanted: Sequence[Wanted]) -> list[torch.Tensor]:
    """As `Memory.places`, each in memory of its own."""
    return [torch.empty(shape, dtype=dtype, device="cpu") for _, dtype, shape, _ in wanted]


class Memory:
    """Memory of this process, pinned where there is a GPU.

    Every tensor made of it keeps a `memoryview` alive, one for all tensors of a save: when that goes, nothing reads the
    memory any more, whatever became of the dict they were in.
    """

    def __init__(self, size: int) -> None:
        pinned = torch.cuda.is_available()
        if pinned:
            self._whole = torch.empty(max(size, 1), dtype=torch.uint8, device="cpu", pin_memory=True)
        else:
            self._whole = new_tensor([max(size, 1)], torch.uint8)
        self._view: memoryview | None = None

    @property
    def size(self) -> int:
        return self._whole.nbytes

    def places(self, wanted: Sequence[tuple[int, torch.dtype, torch.Size, int]]) -> list[torch.Tensor]:
        """Tensors at (offset in bytes, dtype, shape, elements), over one new view of the memory."""
        view = self._view = memoryview(self._whole.numpy())  # type: ignore[arg-type]
        whole = torch.frombuffer(view, dtype=torch.uint8)
        return [
            whole[offset : offset + count * dtype.itemsize].view(dtype).view(shape)
            for offset, dtype, shape, count in wanted
        ]

    def lend(self, staged: Staged) -> object:
        """What lives as long as anything of the last `places` does; called once for each."""
        view, self._view = self._view, None
        return view


class SharedMemory:
    """Memory that pickling a tensor to another process of this machine doesn't copy.

    The other process's references can't be seen from here. But the dict is held here until it has answered.
    """

    def __init__(self, size: int) -> None:
        self._storage = torch.UntypedStorage._new_shared(max(size, 1), device="cpu")  # type: ignore[no-untyped-call]

    @property
    def size(self) -> int:
        return int(self._storage.nbytes())

    def places(self, wanted: Sequence[tuple[int, torch.dtype, torch.Size, int]]) -> list[torch.Tensor]:
        """As `Memory.places`."""
        return [
            torch.empty(0, dtype=dtype, device="cpu").set_(
                self._storage, offset // dtype.itemsize, shape, torch.empty(shape, device="meta").stride()
            )
            for offset, dtype, shape, _ in wanted
        ]

    def lend(self, staged: Staged) -> object:
        """As `Memory.lend`."""
        return staged
