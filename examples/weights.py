"""Telling models apart, for examples that show that a resumed run ends as one that was never stopped."""

from __future__ import annotations

import hashlib

from torch import nn


def digest(model: nn.Module) -> str:
    """Equal only for models whose parameters are equal bit for bit."""
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()[:16]
