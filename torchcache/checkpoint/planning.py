"""torch's default plans, made while the garbage collector waits."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan

from torchcache.checkpoint.garbage import CALM_S, MANY_ITEMS, Truce, garbage_waits


class Planner(DefaultSavePlanner):
    """Plans as DefaultSavePlanner does. `close` it when the save is over, whether it was planned or not."""

    _calm: Truce | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        with garbage_waits():
            super().set_up_planner(state_dict, storage_meta, is_coordinator)
            if self._calm is None and len(self.state_dict) >= MANY_ITEMS:
                self._calm = Truce(CALM_S)  # what is made from here on lives until the commit

    def close(self) -> None:
        """Forgets what was planned, and then lets the garbage collector go on."""
        calm = self._calm
        vars(self).clear()
        if calm is not None:
            calm.end()

    def create_local_plan(self) -> SavePlan:
        with garbage_waits():
            return super().create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> Any:
        # A plain tensor is itself whatever is asked of it; torch looks for shards first.
        found = self.state_dict.get(index.fqn)
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not any(index.offset or ()):
            return found
        return super().lookup_object(index)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        with garbage_waits():
            return super().create_global_plan(all_plans)
