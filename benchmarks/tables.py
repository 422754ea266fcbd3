"""Findings as text: a table in the terminal, a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.findings import Findings

COLUMNS: Final = ("what", "goal", "ours", "beside it", "ratio", "reached")
_LEAST_WIDTH: Final = 120


def show(findings: Findings, rounds: int) -> None:
    """Prints one section."""
    plain = findings.as_json(rounds)
    table = Table(title=f"{plain['title']}, {plain['rounds']} rounds", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("what", "beside it") else "right")
    for row in cells(plain):
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(table)
    if plain["note"]:
        console.print(plain["note"], style="dim")


def markdown(section: Mapping[str, Any]) -> str:
    """The section's table, and below it where and when it was measured."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in cells(section)),
        "",
        f"{section['rounds']} rounds, {section['measured']}: {_where(section['machine'])}.",
    ]
    return "\n".join(lines) + (f" {section['note']}" if section["note"] else "")


def cells(section: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """A section's rows, from its plain values, as `COLUMNS`."""
    for row in section["rows"]:
        unit = row["unit"]
        yield (
            row["what"],
            _goal(row["goal"], unit),
            _figure(row["ours"], unit),
            f"{row['against']}: {_figure(row['bare'], unit)}" if row["bare"] is not None else row["against"],
            f"{row['ratio']:.2f}" if row["ratio"] is not None else "",
            {True: "yes", False: "no", None: ""}[row["reached"]],
        )


def _goal(goal: Mapping[str, Any] | None, unit: str) -> str:
    if goal is None:
        return ""
    bound = f"{goal['bound']:.3g} x" if goal["of"] == "ratio" else _figure(goal["bound"], unit)
    return ("≥ " if goal["sense"] == "at least" else "≤ ") + bound


def _figure(value: float, unit: str) -> str:
    """Three digits that count."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


def _where(machine: Mapping[str, str]) -> str:
    named = {"cpu", "cores", "system", "python"}
    versions = ", ".join(f"{name} {v}" for name, v in machine.items() if name not in named)
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}, {versions}"
