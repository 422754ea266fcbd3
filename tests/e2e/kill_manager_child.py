"""Saves one checkpoint after the other until it is killed: run by test_checkpoint_kills.py.

Says "<step> begun" before and "<step> saved" after each, on stdout.
"""

from __future__ import annotations

import sys

import torch

import torchcache as tc

ELEMENTS = 200_000


def content(step: int) -> dict[str, object]:
    """What the checkpoint of a step holds: tensors in which every element tells the step, and the step."""
    return {"a": torch.arange(ELEMENTS) + step, "b": {"c": torch.full((ELEMENTS // 2,), step)}, "step": step}


def main(address: str, token: str, root: str, first: int, mode: str) -> None:
    torch.set_num_threads(1)
    manager = tc.CheckpointManager(root, keep_last=2, pool=tc.connect(address, token=token))
    for step in range(first, first + 1000):
        print(step, "begun", flush=True)
        if mode == "async":
            manager.save_async(step, content(step)).result()
        else:
            manager.save(step, content(step))
        print(step, "saved", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
