"""Progress for anything that takes more than a few seconds (rich, on standard error)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

console = Console(stderr=True)
"""Where progress and log lines go; tables for the user go to standard output."""


def quiet_lightning() -> None:
    """Let Lightning warn, and give no advice.

    Set on the modules that speak: importing lightning resets the level of its root loggers.
    """
    for package in ("pytorch", "fabric"):
        for module in ("rank_zero", "seed", "distributed"):
            name = f"lightning.{package}.utilities.{module}"
            logging.getLogger(name).setLevel(logging.WARNING)


def bar() -> Progress:
    """Make a progress display; use it as a context manager and `add_task` to it.

    Where there is no terminal nothing is shown: log lines say how far a step is.
    """
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show how far it is."""
    with bar() as display:
        yield from display.track(items, description=description, total=total)
