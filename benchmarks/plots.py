"""Plots as SVG, written by hand: bars side by side, ours dark. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

_WIDTH: Final = 760
_LABELS: Final = 290
_BAR: Final = 16
_ROW: Final = 22
_OURS: Final = "#1f5fa8"
_OTHERS: Final = "#b9c4d0"

Bar = tuple[str, float]


def plot(section: Mapping[str, Any]) -> str | None:
    """Throughput of a section's contenders, a group for each thing measured; None if it has none."""
    groups = {
        name: [(one["name"], one["gb_per_s"]) for one in found]
        for name, found in section["contenders"].items()
    }
    if not groups:
        return None
    machine = section["machine"]
    below = f"{machine['cpu']}, {machine['cores']} cores; {section['measured']}"
    return bars(section["title"], groups, unit="GB/s", below=below)


def bars(title: str, groups: Mapping[str, Sequence[Bar]], *, unit: str, below: str) -> str:
    """Horizontal bars under a heading for each group, all to one scale. Ours are those named torchcache."""
    most = max(value for found in groups.values() for _, value in found) or 1.0
    drawn: list[str] = []
    y = 30
    for name, found in groups.items():
        y += _ROW
        drawn.append(_text(10, y, name, weight="bold"))
        for label, value in found:
            y += _ROW
            drawn += _bar(y, label, value, value / most, unit)
        y += 8
    height = y + 34
    frame = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(10, 24, f"{title}, {unit}", weight="bold", size=15),
        *drawn,
        _text(10, height - 12, below, size=11),
        "</svg>",
    ]
    return "\n".join(frame) + "\n"


def _bar(y: int, label: str, value: float, share: float, unit: str) -> list[str]:
    length = max(1.0, share * (_WIDTH - _LABELS - 80))
    colour = _OURS if label.startswith("torchcache") else _OTHERS
    return [
        _text(_LABELS - 8, y, label, anchor="end"),
        f'<rect x="{_LABELS}" y="{y - 13}" width="{length:.1f}" height="{_BAR}" fill="{colour}">'
        f"<title>{escape(label)}: {value:.3g} {escape(unit)}</title></rect>",
        _text(_LABELS + length + 6, y, f"{value:.2f}"),
    ]


def _text(
    x: float, y: float, text: str, *, weight: str = "normal", size: int = 13, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="#222">{escape(text)}</text>'
    )
