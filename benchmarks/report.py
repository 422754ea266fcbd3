"""docs/benchmarks.md from results.json: what stands between its markers, and the plots beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.plots import plot
from benchmarks.tables import markdown

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RESULTS: Final = DOCUMENT.with_suffix("") / "results.json"

_BLOCK: Final = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def document(text: str, results: Mapping[str, Any]) -> str:
    """`text` with every block of figures made anew; one whose section has no results is left empty."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        return match[1] + (_block(name, results[name]) if name in results else "") + match[3]

    return _BLOCK.sub(block, text)


def blocks(text: str) -> list[str]:
    """The sections that `text` has blocks for."""
    return [match[2] for match in _BLOCK.finditer(text)]


def plots(results: Mapping[str, Any]) -> dict[str, str]:
    """File name and SVG text of each plot; a section without contenders has none."""
    return {f"{name}.svg": drawn for name, section in results.items() if (drawn := plot(section))}


def update_document() -> None:
    """Writes the document and its plots. What isn't in the results is no longer there."""
    results = json.loads(RESULTS.read_text())
    DOCUMENT.write_text(document(DOCUMENT.read_text(), results))
    for old in RESULTS.parent.glob("*.svg"):
        old.unlink()
    for name, drawn in plots(results).items():
        (RESULTS.parent / name).write_text(drawn)


def _block(name: str, section: Mapping[str, Any]) -> str:
    picture = f"\n\n![{section['title']}](benchmarks/{name}.svg)" if plot(section) else ""
    return f"{markdown(section)}{picture}\n"
