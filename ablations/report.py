"""The report of a suite: report.html, table.md and effects.csv; and its tables in the terminal.

``write_report(out_dir, [Findings(...), ...]) -> Path`` and ``show([Findings(...), ...])``, with one
`ablations.findings.Findings` per subject.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from ablations.findings import Findings, judged
from ablations.page import render
from ablations.tables import markdown, terminal
from ablations.wording import replication_sentences
from chasm.errors import ConfigError
from chasm.io import atomic_path, write_text

__all__ = ["FILES", "Findings", "show", "write_report"]

logger = logging.getLogger(__name__)

FILES = ("effects.csv", "table.md", "report.html")
"""What `write_report` leaves in its folder."""

_MIN_WIDTH = 110


def write_report(out_dir: Path, found: Sequence[Findings]) -> Path:
    """Write `FILES`: tidy rows, tables, and a page that needs nothing beside it.

    Claims, and q over all regions and subjects, are made here.

    Parameters
    ----------
    out_dir
        Folder of the report.
    found
        What the suite found, one per subject.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        There is no subject, one is given twice, or a `null_p` is not between 0 and 1.
    """
    out_dir = Path(out_dir)
    found = _judged(found)
    write_csv(found, out_dir / "effects.csv")
    write_text(out_dir / "table.md", markdown(found))
    write_text(out_dir / "report.html", render(found))
    logger.info("report written: %s", out_dir / "report.html")
    return out_dir / "report.html"


def write_csv(found: Sequence[Findings], path: Path) -> None:
    """Write the tidy rows of all subjects, pattern correlations last, six digits each."""
    frames = [one.effects.frame for one in found] + [one.patterns for one in found]
    whole = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    with atomic_path(path) as temporary:
        whole.to_csv(temporary, index=False, float_format="%.6g")


def show(found: Sequence[Findings], console: Console | None = None) -> None:
    """Print every subject's tables by region, and what may be claimed, to a terminal.

    Raises
    ------
    ConfigError
        As `write_report`.
    """
    console = console or Console()
    if console.width < _MIN_WIDTH and not console.is_terminal:
        console.width = _MIN_WIDTH
    found = _judged(found)
    for findings in found:
        console.print(terminal(findings))
    for sentence in replication_sentences(found[0]):
        console.print(sentence, style="bold", highlight=False)


def _judged(found: Sequence[Findings]) -> list[Findings]:
    if not found:
        raise ConfigError("report", "no subject to report", "Give the findings of at least one.")
    return judged(found)
