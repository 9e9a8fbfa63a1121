"""The tables of a comparison: scores, difference to the best linear row, costs, published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from rich.console import Console, Group
from rich.text import Text

from chasm.evaluation import tables
from chasm.evaluation.catalogue import GROUP_METRICS, MAIN_METRICS, label_of
from chasm.evaluation.cost import Cost
from chasm.evaluation.grids import Cell, Grid, Line, cells_of, markdown_grid, rich_grid
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.published import published_heading, published_note, published_value
from chasm.evaluation.scores import Scores

METRICS = (
    "noise_normalised_r2",
    "pattern_correlation",
    "voxelwise_correlation_mean",
    "voxelwise_correlation_median",
    "r2",
    "mse",
)
"""Columns of the table; the other ones of the score table follow in a second one."""

_MIN_WIDTH = 132


@dataclass(frozen=True)
class Level:
    """The comparison at voxels, or at parcels.

    Attributes
    ----------
    file
        All rows.
    scores
        Of that file.
    costs
        By row, for the rows whose cost is known.
    """

    file: PredictionFile
    scores: Scores
    costs: Mapping[str, Cost]

    @property
    def suffix(self) -> str:
        """Ends the names of this level's files; the parcels have one."""
        return "_parcels" if self.scores.info.unit == "parcel" else ""

    def system(self, row: str) -> str:
        """Name of a row without the recipe that tells it from others of its kind."""
        if row not in self.file.rows:
            return row
        recipe = self.file.rows[row].details.get("recipe")
        return row.removesuffix(f" ({recipe})")


@dataclass(frozen=True)
class Comparison:
    """Voxels first, then parcels, and what could not be compared.

    Attributes
    ----------
    levels
        One or both of them.
    failed
        Name of a recipe to the error it ended with.
    """

    levels: tuple[Level, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def cost_frame(level: Level) -> pd.DataFrame:
    """Costs and published values as a table, one line per row of the level."""
    info = level.scores.info
    lines = [
        {
            "row": name,
            **(vars(level.costs[name]) if name in level.costs else {}),
            "published": published_value(level.system(name), info.unit),
        }
        for name in level.file.rows
    ]
    return pd.DataFrame(lines)


def best_linear(scores: Scores) -> str:
    """Name of the linear row (or the mean pattern) that the others are compared with."""
    return str(scores.frame["best_baseline"].iloc[0])


def deciding_metric(scores: Scores) -> str:
    """Metric of the differences: noise-normalised R², or R² where no ceiling is known."""
    frame = scores.frame
    known = frame.loc[frame["metric"] == "noise_normalised_r2", "value"].notna().any()
    return "noise_normalised_r2" if known else "r2"


def _overall(scores: Scores) -> pd.DataFrame:
    return scores.frame[scores.frame["level"] == "all"]


def score_lines(level: Level, metrics: Sequence[str] = METRICS) -> Grid:
    """Rows by metrics."""
    grid = tables.score_grid(level.scores, metrics)
    return Grid(_title(level), grid.columns, grid.lines, f"{_joining_note(level)} {grid.note}")


def cost_lines(level: Level) -> Grid:
    """Rows by the difference to the best linear row, the costs and the published value."""
    scores, unit = level.scores, level.scores.info.unit
    best, metric = best_linear(scores), deciding_metric(scores)
    frame = _overall(scores)
    frame = frame[frame["metric"] == metric]
    differences = cells_of(frame, "row", frame["row"], "difference")
    lines = []
    for (name, kind), difference in zip(frame[["row", "kind"]].values, differences, strict=True):
        cells = _cost_cells(level.costs.get(name))
        known: Cell | str = difference if difference.value is not None else "–"
        lines.append(Line(name, kind, (known, *cells, published_value(level.system(name), unit))))
    timed = {(cost.batch_size, cost.device) for cost in level.costs.values()}
    batches = " / ".join(str(size) for size in sorted({size for size, _ in timed}))
    return Grid(
        f"{_title(level)}: difference to the best linear row, cost, published value",
        (
            f"{label_of(metric, unit, short=True)} − {best}",
            "Parameters",
            "trained",
            "GFLOP / image",
            f"ms / batch of {batches}" if batches else "ms / batch",
            published_heading(unit),
        ),
        tuple(lines),
        f"{tables.BEST_BASELINE} {_cost_note(timed)} {published_note(unit)}",
    )


def comparison_grid(level: Level) -> Grid:
    """Put scores, difference, cost and published value of every row into one table."""
    scored, costs = score_lines(level), cost_lines(level)
    lines = [
        Line(left.label, left.kind, (*left.cells, *right.cells))
        for left, right in zip(scored.lines, costs.lines, strict=True)
    ]
    return Grid(
        scored.title,
        (*scored.columns, *costs.columns),
        tuple(lines),
        f"{scored.note} {costs.note}".strip(),
    )


def further_grids(level: Level) -> list[Grid]:
    """List the metrics that the table leaves out, and the first one by group of areas."""
    rest = [metric for metric in MAIN_METRICS if metric not in METRICS]
    found = [
        tables.score_grid(level.scores, rest, suffix=" (further metrics)"),
        tables.group_grid(level.scores, GROUP_METRICS[0]),
    ]
    return [grid for grid in found if grid is not None]


def _joining_note(level: Level) -> str:
    """Say what was done to the rows that predict other units than this level's."""
    linear = f"Linear rows were fitted to the {level.scores.info.unit}s."
    others = [
        name
        for name, row in level.file.rows.items()
        if row.details.get("predicts", f"{level.scores.info.unit}s") != f"{level.scores.info.unit}s"
    ]
    if not others:
        return linear
    how = (
        "of each parcel, the mean of its voxels"
        if level.scores.info.unit == "parcel"
        else "each voxel has its parcel's value, or its train mean where it has no parcel"
    )
    return f"{linear} {', '.join(others)}: {how}."


def _title(level: Level) -> str:
    return f"All baselines, at {level.scores.info.unit}s"


def _cost_cells(cost: Cost | None) -> tuple[str, str, str, str]:
    if cost is None:
        return ("–", "–", "–", "–")
    time = "–" if cost.milliseconds is None else f"{cost.milliseconds:.3g}"
    return (_millions(cost.parameters), _millions(cost.trained), f"{cost.flops / 1e9:.3g}", time)


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}\N{NO-BREAK SPACE}M"


def _cost_note(timed: set[tuple[int, str]]) -> str:
    if not timed:
        return ""
    devices = "; ".join(sorted({device for _, device in timed}))
    return (
        "Costs are from tokens to units, without the backbone; a multiply and an add count two "
        f"operations; times are medians on {devices}. Linear rows are costed in their primal form."
    )


def findings(level: Level) -> list[str]:
    """Say which trained rows lie above or below the best linear row, and which are undecided."""
    scores = level.scores
    best, metric = best_linear(scores), deciding_metric(scores)
    frame = _overall(scores)
    frame = frame[frame["metric"] == metric].set_index("row")
    label = label_of(metric, scores.info.unit)
    first = f"At {scores.info.unit}s the best linear row is {best}: {label} "
    first += f"{frame['value'][best]:.3f}."
    models = frame[frame["kind"] == "model"]
    known = models[models["difference_low"].notna()]
    if known.empty:
        return [first]
    groups = {
        "Above it (the 95 % interval excludes 0)": known["difference_low"] > 0,
        "Below it (the 95 % interval excludes 0)": known["difference_high"] < 0,
        "Not told apart from it by these images": (known["difference_low"] <= 0)
        & (known["difference_high"] >= 0),
    }
    sentences = [first]
    for what, chosen in groups.items():
        rows = [f"{name} ({line['difference']:+.3f})" for name, line in known[chosen].iterrows()]
        if rows:
            sentences.append(f"{what}: {', '.join(rows)}.")
    return sentences


def failure_lines(failed: Mapping[str, str]) -> list[str]:
    """Say which recipes are missing from the table, and why."""
    return [f"{name} is missing: {error}" for name, error in failed.items()]


def markdown(comparison: Comparison) -> str:
    """Return the whole comparison as Markdown."""
    parts = []
    for level in comparison.levels:
        parts += [f"# {tables.headline(level.scores)}", " ".join(findings(level))]
        parts += [tables.method(level.scores), markdown_grid(comparison_grid(level))]
        parts += [markdown_grid(grid) for grid in further_grids(level)]
    parts += [f"- {line}" for line in failure_lines(comparison.failed)]
    return "\n\n".join(parts) + "\n"


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print each table to a terminal, in two pieces of usual width; what failed comes last."""
    console = console or Console()
    if console.width < _MIN_WIDTH and not console.is_terminal:
        console.width = _MIN_WIDTH
    for level in comparison.levels:
        scores = level.scores
        style = "bold yellow" if scores.info.simulated else "bold"
        pieces = [rich_grid(score_lines(level)), rich_grid(cost_lines(level))]
        texts = [Text(line) for line in (tables.method(scores), *findings(level))]
        console.print(Group(Text(tables.headline(scores), style=style), *pieces, *texts))
    for line in failure_lines(comparison.failed):
        console.print(Text(line, style="bold red"))
