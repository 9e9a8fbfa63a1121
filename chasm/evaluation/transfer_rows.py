"""The paper's transfer table: from which subjects, to which, with which arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.text import Text

from chasm.evaluation import tables, wording
from chasm.evaluation.bootstrap import interval
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.grids import Grid, Line, make_cell, markdown_grid, number, rich_grid
from chasm.evaluation.page import fill
from chasm.evaluation.prediction_parts import RunInfo
from chasm.evaluation.published import PUBLISHED_TRANSFER, TRANSFER_NOTE
from chasm.evaluation.transfer import Cell
from chasm.evaluation.transfer_arms import ARMS, REFERENCE
from chasm.evaluation.transfer_tables import headline, told_apart

WITHIN = "within"
"""Arm of a model that is trained on the subject itself, by the source's recipe."""

METRICS = ("pattern_correlation", "mse", "noise_normalised_r2", "voxelwise_correlation_mean")
"""Columns of the table."""

_PUBLISHED_ARMS = ("head", WITHIN)
_MIN_WIDTH = 150


@dataclass(frozen=True)
class TransferRow:
    """Arms from the same source on the same new subject.

    Attributes
    ----------
    sources, target
        Names of the subjects; a source that is the target stands for `WITHIN`.
    cells
        Arm to its cell.
    ceiling
        Metric to the score of the best possible prediction.
    target_variance, n_images
        Of the target's test images.
    info
        What the cells are about.
    """

    sources: tuple[str, ...]
    target: str
    cells: Mapping[str, Cell]
    ceiling: Mapping[str, float]
    target_variance: float
    n_images: int
    info: RunInfo


@dataclass(frozen=True)
class TransferTable:
    """All rows, the resamples, and the rows or arms that are missing with their errors."""

    rows: tuple[TransferRow, ...]
    n_boot: int
    failed: Mapping[str, str] = field(default_factory=dict)


def transfer_frame(table: TransferTable) -> pd.DataFrame:
    """Make the tidy table.

    Returns
    -------
    pandas.DataFrame
        One line per row, arm and metric: source, target, arm, n, n_trained, metric, value, low,
        high, difference, difference_low, difference_high (arm minus ridge from scratch on the
        same resamples), ceiling, target_variance, published.
    """
    lines: list[dict[str, Any]] = []
    for row in table.rows:
        source = "+".join(row.sources)
        ridge = row.cells.get(REFERENCE)
        for arm, cell in row.cells.items():
            published = PUBLISHED_TRANSFER.get((source, row.target), "–")
            start: dict[str, Any] = {
                "source": source,
                "target": row.target,
                "arm": arm,
                "label": _label(row, arm),
            }
            start |= {"n": cell.n, "n_trained": cell.n_trained}
            start |= {"published": published if arm in _PUBLISHED_ARMS else "–"}
            for metric, value in cell.points.items():
                low, high = interval(cell.samples[metric])
                line = start | {"metric": metric, "value": value, "low": low, "high": high}
                if ridge is not None and arm != REFERENCE:
                    low, high = interval(cell.samples[metric] - ridge.samples[metric])
                    difference = value - ridge.points[metric]
                    line |= {"difference": difference}
                    line |= {"difference_low": low, "difference_high": high}
                line |= {"ceiling": row.ceiling[metric], "target_variance": row.target_variance}
                lines.append(line)
    return pd.DataFrame(lines)


def _label(row: TransferRow, arm: str) -> str:
    if arm == WITHIN:
        return f"{row.target} alone (within subject)"
    if ARMS[arm].kind != "adapter":
        return f"{row.target}: {ARMS[arm].label}"
    return f"{', '.join(row.sources)} → {row.target}: {ARMS[arm].label}"


def transfer_grid(table: TransferTable) -> Grid:
    """Lines by new subject: its image-blind and scratch rows once, adapters, within, ceiling."""
    frame = transfer_frame(table)
    lines: list[Line] = []
    for target, own in frame.groupby("target", sort=False):
        kept = own.drop_duplicates(["label", "metric"])
        rank = {"mean_pattern": 0, "ridge": 1, "banded_ridge": 2, WITHIN: 4}
        for _, part in sorted(
            kept.groupby("label", sort=False), key=lambda item: rank.get(item[1]["arm"].iloc[0], 3)
        ):
            lines.append(_line(part.set_index("metric")))
        row = next(row for row in table.rows if row.target == target)
        ceilings = [number(row.ceiling[metric]) for metric in METRICS]
        lines.append(Line(f"{target}: noise ceiling", "ceiling", (*ceilings, "–", "–", "–")))
    unit = table.rows[0].info.unit
    columns = [label_of(metric, unit, short=True) for metric in METRICS]
    difference = label_of("noise_normalised_r2", unit, short=True)
    noted = ", ".join(
        f"{row.target} {row.target_variance:.3f} ({row.n_images} test images)"
        for row in {row.target: row for row in table.rows}.values()
    )
    return Grid(
        "Transfer to a new subject, all its train images",
        (
            *columns,
            f"{difference} − {ARMS[REFERENCE].label}",
            "Weights fitted",
            "Published: pattern r · MSE",
        ),
        tuple(lines),
        f"Target variance: {noted}. {TRANSFER_NOTE}",
    )


def _line(at: pd.DataFrame) -> Line:
    first = at.iloc[0]
    arm = str(first["arm"])
    kind = "model" if arm not in ARMS or ARMS[arm].kind == "adapter" else ARMS[arm].kind
    cells = [make_cell(*at.loc[m, ["value", "low", "high"]].astype(float)) for m in METRICS]
    columns = ["difference", "difference_low", "difference_high"]
    change = make_cell(*at.loc["noise_normalised_r2", columns].astype(float), signed=True)
    return Line(
        str(first["label"]), kind, (*cells, change, f"{first['n_trained']:,}", first["published"])
    )


def findings(table: TransferTable) -> list[str]:
    """Say which rows lie above, below or beside ridge from scratch on their subject."""
    frame = transfer_frame(table)
    if "difference_low" not in frame:
        return ["No row is compared with ridge from scratch."]
    frame = frame[frame["metric"] == "noise_normalised_r2"]
    frame = frame[~frame["arm"].isin(["mean_pattern", "banded_ridge"])]
    sentences = []
    for what, lines in told_apart(frame, "ridge from scratch").items():
        texts = [f"{line['label']} ({line['difference']:+.3f})" for _, line in lines.iterrows()]
        start = what[:1].upper() + what[1:]
        sentences.append(f"{start} in noise-normalised R²: {'; '.join(texts)}.")
    return sentences or ["No row is compared with ridge from scratch."]


def notes(table: TransferTable) -> list[str]:
    """Say how the intervals were made, and what is missing."""
    how = (
        f"In brackets: 95 % intervals over test images, {table.n_boot} bootstrap resamples; rows "
        "of one new subject share them."
        if table.n_boot
        else "No intervals were computed."
    )
    return [how, *(f"{name} is missing: {error}" for name, error in table.failed.items())]


def _headline(table: TransferTable) -> str:
    first = table.rows[0]
    return headline(first.info, first.n_images).replace(first.info.subject, "Transfer", 1)


def markdown(table: TransferTable) -> str:
    """Return the table as Markdown."""
    parts = [f"# {_headline(table)}", " ".join(findings(table)), *notes(table)]
    return "\n\n".join([*parts, markdown_grid(transfer_grid(table))]) + "\n"


def show(table: TransferTable, console: Console | None = None) -> None:
    """Print the table to a terminal."""
    console = console or Console()
    if console.width < _MIN_WIDTH and not console.is_terminal:
        console.width = _MIN_WIDTH
    style = "bold yellow" if table.rows[0].info.simulated else "bold"
    texts = [Text(line) for line in (*notes(table), *findings(table))]
    title = Text(_headline(table), style=style)
    console.print(Group(title, rich_grid(transfer_grid(table)), *texts))


def render(table: TransferTable) -> str:
    """Make the page of the table."""
    info = table.rows[0].info
    arms = {arm for row in table.rows for arm in row.cells}
    meanings = [Line(ARMS[arm].label, "", (ARMS[arm].meaning,)) for arm in ARMS if arm in arms] + [
        Line("within subject", "", ("the source's recipe, trained on the subject itself",))
    ]
    prints = {
        f"{' + '.join(row.sources)} → {row.target}: {name}": value
        for row in table.rows
        for name, value in row.info.fingerprints.items()
    }
    context = {
        "info": info,
        "title": "Transfer to new subjects",
        "headline": _headline(table),
        "findings": findings(table),
        "notes": notes(table),
        "figure": None,
        "grids": [transfer_grid(table)],
        "arms": Grid("Arms", ("What it is",), tuple(meanings)),
        "metrics": wording.metric_facts(info.unit),
        "published": tables.published_grid(),
        "facts": prints,
    }
    return fill("transfer.html.j2", context)
