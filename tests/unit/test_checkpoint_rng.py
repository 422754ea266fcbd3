"""Random states of CUDA devices, of which this machine may have none: the calls, recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchcache.checkpoint.resume import Record, rng_state, set_rng_state


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the generators of two devices hold; the first is the current one."""
    held = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]

    def set_all(states: Any) -> None:
        for number, state in enumerate(states):
            held[number][:] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(held))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in held])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_all)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: set_all([state]))
    return held


def travelled(rng: dict[str, Any]) -> dict[str, Any]:
    found = Record.decode(Record(world_size=1, rng=rng).encode(), where="here").rng
    assert found is not None
    return found


def values(devices: list[torch.Tensor]) -> list[list[int]]:
    return [state.tolist() for state in devices]


def test_every_device_is_put_back(devices: list[torch.Tensor]) -> None:
    saved = travelled(rng_state())
    for state in devices:
        state.zero_()
    set_rng_state(saved)
    assert values(devices) == [[1, 2], [3, 4]]


def test_with_fewer_devices_those_there_are(devices: list[torch.Tensor]) -> None:
    saved = travelled(rng_state())
    del devices[1]
    devices[0].zero_()
    set_rng_state(saved)
    assert values(devices) == [[1, 2]]


def test_a_state_of_before_is_the_current_device_s(devices: list[torch.Tensor]) -> None:
    old = travelled({**rng_state(), "cuda": torch.tensor([7, 8], dtype=torch.uint8)})
    set_rng_state(old)
    assert values(devices) == [[7, 8], [3, 4]]
