"""Tables in words and numbers, independent of how they are shown; Markdown and terminal forms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from rich.table import Table
from rich.text import Text

STYLES = {"model": "bold", "reference": "dim", "ceiling": "italic"}
"""How the lines of each kind look in a terminal."""


@dataclass(frozen=True)
class Cell:
    """A number with its interval, each None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    signed: bool = False

    @property
    def text(self) -> str:
        """The value, ``–`` when there is none."""
        if self.value is None:
            return "–"
        return f"{self.value:+.3f}" if self.signed else f"{self.value:.3f}"

    @property
    def interval(self) -> str:
        """``[low, high]``, empty when there is none."""
        if self.low is None or self.high is None:
            return ""
        digits = "+.2f" if self.signed else ".2f"
        return f"[{self.low:{digits}}, {self.high:{digits}}]"


@dataclass(frozen=True)
class Line:
    """One line of a grid: its label, kind (for the style) and cells or plain texts."""

    label: str
    kind: str
    cells: tuple[Cell | str, ...]


@dataclass(frozen=True)
class Grid:
    """A table in words and numbers, independent of how it is shown."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""


def cells_of(
    part: pd.DataFrame, by: str, keys: Iterable[str], column: str = "value"
) -> tuple[Cell, ...]:
    """Cells of the lines of a tidy frame, in the order of `keys`.

    Parameters
    ----------
    part
        One line per key.
    by
        Column of the keys.
    keys
        Which lines.
    column
        ``value``, with the interval ``low``, ``high``; or another column c, with the interval
        ``c_low``, ``c_high`` and a sign before the number.
    """
    plain = column == "value"
    names = ["value", "low", "high"] if plain else [column, f"{column}_low", f"{column}_high"]
    table = part.set_index(by)[names].astype(float)
    return tuple(make_cell(*table.loc[key], signed=not plain) for key in keys)


def make_cell(value: float, low: float, high: float, *, signed: bool = False) -> Cell:
    """Make a cell of three numbers, NaN where there is none."""
    known = [None if math.isnan(x) else float(x) for x in (value, low, high)]
    return Cell(known[0], known[1], known[2], signed)


def number(value: float) -> str:
    """Write a number with three decimals, ``–`` for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def markdown_grid(grid: Grid) -> str:
    """Return a grid as Markdown: heading, table, note."""
    rows = [["", *grid.columns]]
    for line in grid.lines:
        label = f"**{line.label}**" if line.kind == "model" else line.label
        texts = [
            cell if isinstance(cell, str) else f"{cell.text} {cell.interval}".strip()
            for cell in line.cells
        ]
        rows.append([label, *texts])
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    lines.insert(1, "|---" + "|--:" * len(grid.columns) + "|")
    note = f"\n\n{grid.note}" if grid.note else ""
    return f"## {grid.title}\n\n" + "\n".join(lines) + note


def rich_grid(grid: Grid) -> Table:
    """Return a grid as a table for the terminal, intervals below the numbers."""
    table = Table(title=grid.title, caption=grid.note or None, title_justify="left")
    table.caption_justify = "left"
    table.add_column("")
    for column in grid.columns:
        table.add_column(column, justify="right")
    for line in grid.lines:
        cells = [
            cell if isinstance(cell, str) else f"{cell.text}\n{cell.interval}".rstrip()
            for cell in line.cells
        ]
        table.add_row(line.label, *(Text(cell) for cell in cells), style=STYLES.get(line.kind))
    return table
