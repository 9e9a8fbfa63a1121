"""The tables of the calibration: on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ablations.calibration_criteria import Calibration, Line
from chasm.errors import ConfigError
from chasm.io import write_text

DOCS = Path(__file__).parents[1] / "docs" / "calibration.md"
BEGIN, END = "<!-- calibration table -->", "<!-- end of calibration table -->"
HEADER = ("variant (SIMULATED)", "criterion", "n", "rate", "2 SE", "wanted", "")

Rows = list[tuple[str, ...]]


def criteria_rows(result: Calibration) -> Rows:
    """One row per criterion, a header first; coverage over all variants last."""
    return [HEADER, *map(_cells, [*result.lines, *result.coverage["all"].values()])]


def _cells(line: Line) -> tuple[str, ...]:
    verdict = {None: "", True: "pass", False: "FAIL"}[line.passed]
    rate = (f"{line.rate:.3f}", f"{line.two_se:.3f}") if line.n else ("", "")
    return (line.variant, line.criterion, str(line.n), *rate, line.wanted, verdict)


def coverage_rows(result: Calibration) -> Rows:
    """One row per variant and one column per interval, a header first."""
    header = ("variant (SIMULATED)", *result.coverage["all"])
    return [
        header,
        *(
            (name, *(f"{line.rate:.3f} ({line.n})" if line.n else "" for line in columns.values()))
            for name, columns in result.coverage.items()
        ),
    ]


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Write a table in Markdown."""
    ruled = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def show(result: Calibration) -> None:
    """Print both tables."""
    titles = ("Calibration of the ablation suite", "Coverage of 95 % intervals")
    for title, rows in zip(titles, (criteria_rows(result), coverage_rows(result)), strict=True):
        table = Table(*rows[0], title=f"{title}, SIMULATED brains")
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)


def write_docs(result: Calibration, command: str, path: Path = DOCS) -> None:
    """Put both tables, and the command that made them, between the marks of the documentation.

    Raises
    ------
    ConfigError
        The file lacks a mark.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ConfigError(path, f"no {BEGIN} or {END}", "Put both marks where the tables belong.")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    tables = f"{markdown(criteria_rows(result))}\n\n{markdown(coverage_rows(result))}"
    write_text(path, f"{before}{BEGIN}\n`{command}` gave:\n\n{tables}\n{END}{after}")
