"""Score tables for the terminal, for Markdown and for the report, from one tidy frame."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Console, Group
from rich.text import Text

from chasm.evaluation.catalogue import (
    GROUP_METRICS,
    MAIN_METRICS,
    PUBLISHED,
    ROI_METRICS,
    label_of,
)
from chasm.evaluation.grids import Grid, Line, cells_of, markdown_grid, number, rich_grid
from chasm.evaluation.prediction_parts import MAIN_TARGET
from chasm.evaluation.sampling import sampling_grid
from chasm.evaluation.scores import Scores

_MIN_WIDTH = 110

BEST_BASELINE = (
    "The best baseline is the row, mean pattern included, with the highest noise-normalised R² "
    "over all units on these same images (without a noise ceiling: the highest R²); the intervals "
    "do not include that choice."
)
"""How the row is chosen that models are compared with."""


def headline(scores: Scores) -> str:
    """Title of every table: SIMULATED when it is so, subject, unit, split, backbone."""
    info = scores.info
    parts = [
        f"{info.subject} ({info.dataset})",
        f"{info.unit}s",
        f"split {info.split}",
        f"{scores.n_images} test images",
    ]
    if info.backbone or info.weights_label:
        weights = f" [{info.weights_label}]" if info.weights_label else ""
        parts.append(f"backbone {info.backbone or 'unnamed'}{weights}")
    prefix = "SIMULATED · " if info.simulated else ""
    return prefix + " · ".join(parts)


def target_name(target: str, unit: str) -> str:
    """Return what a target is called in a title."""
    main = "plain parcel means" if unit == "parcel" else f"{unit}s"
    return {MAIN_TARGET: main, "top_p": "top-p parcel means"}.get(target, target)


def score_grid(
    scores: Scores, metrics: Sequence[str], target: str = MAIN_TARGET, suffix: str = ""
) -> Grid:
    """Rows by metrics, over all units; `suffix` ends the title."""
    unit = scores.info.unit
    frame = scores.frame
    frame = frame[(frame["target"] == target) & (frame["level"] == "all")]
    variance = frame["target_variance"].iloc[0]
    left_out = _left_out_note(frame[frame["metric"].isin(list(metrics))], unit)
    columns = tuple(
        label_of(metric, unit, short=True)
        + (f" (target variance {variance:.3f})" if metric == "mse" else "")
        for metric in metrics
    )
    return Grid(
        f"Scores against {target_name(target, unit)}{suffix}",
        columns,
        tuple(
            Line(str(name), part["kind"].iloc[0], cells_of(part, "metric", metrics))
            for name, part in frame.groupby("row", sort=False)
        ),
        f"{left_out} {_trained_note(frame, target, unit)}".strip(),
    )


def difference_grid(
    scores: Scores, metrics: Sequence[str], target: str = MAIN_TARGET
) -> Grid | None:
    """Models minus the best baseline, and minus their components, on the same resamples.

    None without a model.
    """
    frame = scores.frame
    frame = frame[
        (frame["target"] == target) & (frame["level"] == "all") & (frame["kind"] == "model")
    ]
    if frame.empty:
        return None
    best = frame["best_baseline"].iloc[0]
    lines = [
        Line(f"{name} − {best}", "model", cells_of(part, "metric", metrics, "difference"))
        for name, part in frame.groupby("row", sort=False)
    ]
    gains = scores.gains
    gains = gains[(gains["target"] == target) & (gains["level"] == "all")]
    lines += [
        Line(f"{name} − {other}", "model", cells_of(part, "metric", metrics, "difference"))
        for (name, other), part in gains.groupby(["row", "other"], sort=False)
    ]
    return Grid(
        f"Difference to the best baseline ({best}), same resamples"
        if gains.empty
        else f"Differences to the best baseline ({best}) and to parts of the model, same resamples",
        tuple(label_of(metric, scores.info.unit, short=True) for metric in metrics),
        tuple(lines),
        BEST_BASELINE + (" For the squared error, below 0 is better." if "mse" in metrics else ""),
    )


def group_grid(scores: Scores, metric: str, target: str = MAIN_TARGET) -> Grid | None:
    """Rows by all / Early / Mid / Higher; None when there are no groups."""
    frame = scores.frame
    frame = frame[
        (frame["target"] == target)
        & (frame["metric"] == metric)
        & frame["level"].isin(["all", "group"])
    ]
    regions = frame.drop_duplicates("region")
    if len(regions) < 2:
        return None
    known = zip(regions["region"], regions["n_voxels"], regions["mean_nc"], strict=True)
    facts = ", ".join(f"{region} {voxels} ({number(nc)})" for region, voxels, nc in known)
    return Grid(
        f"{label_of(metric, scores.info.unit)}, by group",
        tuple(regions["region"]),
        tuple(
            Line(str(name), part["kind"].iloc[0], cells_of(part, "region", regions["region"]))
            for name, part in frame.groupby("row", sort=False)
        ),
        f"{voxels_name(scores.info.unit)} (mean noise ceiling): {facts}.",
    )


def region_grid(scores: Scores, metric: str, target: str = MAIN_TARGET) -> Grid | None:
    """ROIs by rows of the score table; None when no atlas is known."""
    frame = scores.frame
    frame = frame[
        (frame["target"] == target) & (frame["metric"] == metric) & (frame["level"] == "roi")
    ]
    frame = frame[frame["kind"].isin(["model", "component", "baseline"])]
    if frame.empty:
        return None
    names = list(frame["row"].unique())
    unit = scores.info.unit
    parcels = unit == "parcel"
    lines = []
    for (atlas, region), part in frame.groupby(["atlas", "region"], sort=False):
        first = part.iloc[0]
        counts = [f"{first['n_voxels']}"] + ([f"{first['n_units']}"] if parcels else [])
        facts = (f"{atlas}", *counts, number(first["mean_nc"]))
        lines.append(Line(f"{region}", str(atlas), (*facts, *cells_of(part, "row", names))))
    counted = [voxels_name(unit)] + (["Parcels"] if parcels else [])
    return Grid(
        f"{label_of(metric, unit)}, by ROI",
        ("Atlas", *counted, "Mean ceiling", *names),
        tuple(lines),
        "A parcel counts with its number of voxels in the ROI." if parcels else "",
    )


def voxels_name(unit: str) -> str:
    """Return what the smallest units are called in a heading: voxels, where they may be so."""
    return "Units" if unit == "unit" else "Voxels"


def published_grid() -> Grid:
    """List published numbers with what they measure, not to be ranked against ours."""
    return Grid(
        "Published numbers",
        ("Metric", "Data", "Value"),
        tuple(Line(row.system, "", (row.metric, row.data, row.value)) for row in PUBLISHED),
        "Other data, other metrics: each stands on its own and none may be ranked against the "
        "rows above or each other.",
    )


def grids(scores: Scores, group_metrics: Sequence[str] = GROUP_METRICS) -> list[Grid]:
    """List the grids that a person reads first: scores, difference, groups."""
    found = [
        score_grid(scores, MAIN_METRICS[:5]),
        score_grid(scores, MAIN_METRICS[5:], suffix=" (continued)"),
        difference_grid(scores, MAIN_METRICS[:5]),
        *(group_grid(scores, metric) for metric in group_metrics),
    ]
    return [grid for grid in found if grid is not None]


def draws_grid(scores: Scores) -> Grid | None:
    """Draws against repeats, see `chasm.evaluation.sampling`; None where there are none."""
    if scores.draws is None or scores.spreads is None:
        return None
    return sampling_grid(scores.spreads, scores.draws, scores.info.unit)


def alternative_targets(scores: Scores) -> list[str]:
    """Names of the targets beside the main one."""
    return [name for name in scores.frame["target"].unique() if name != MAIN_TARGET]


def target_grid(scores: Scores, target: str, n_metrics: int | None = None) -> Grid:
    """Rows by the first metrics that have a value for a target, over all units."""
    frame = scores.frame
    part = frame[(frame["target"] == target) & (frame["level"] == "all")]
    known = set(part.loc[part["value"].notna(), "metric"])
    return score_grid(scores, [key for key in MAIN_METRICS if key in known][:n_metrics], target)


def markdown(scores: Scores) -> str:
    """Return the whole score table as Markdown."""
    parts = [f"# {headline(scores)}", method(scores)]
    parts += [markdown_grid(grid) for grid in grids(scores)]
    parts += [
        markdown_grid(grid)
        for grid in (region_grid(scores, metric) for metric in ROI_METRICS)
        if grid is not None
    ]
    for target in alternative_targets(scores):
        parts.append(markdown_grid(target_grid(scores, target)))
    drawn = draws_grid(scores)
    parts += [] if drawn is None else [markdown_grid(drawn)]
    parts.append(markdown_grid(published_grid()))
    return "\n\n".join(parts) + "\n"


def show(scores: Scores, console: Console | None = None) -> None:
    """Print the score tables to a terminal."""
    console = console or Console()
    if console.width < _MIN_WIDTH and not console.is_terminal:
        console.width = _MIN_WIDTH
    shown = grids(scores, GROUP_METRICS[:1])
    for target in alternative_targets(scores):
        shown.append(target_grid(scores, target, 4))
    drawn = draws_grid(scores)
    shown += [] if drawn is None else [drawn]
    title = Text(headline(scores), style="bold yellow" if scores.info.simulated else "bold")
    console.print(Group(title, *(rich_grid(grid) for grid in shown), Text(method(scores))))


def _left_out_note(frame: pd.DataFrame, unit: str) -> str:
    """Say which rows have units or images without a correlation."""
    texts = []
    for metric, what in (
        ("voxelwise_correlation_mean", f"{unit}s"),
        ("pattern_correlation", "images"),
    ):
        part = frame[(frame["metric"] == metric) & (frame["left_out"] > 0)]
        found = zip(part["row"], part["left_out"], strict=True)
        texts += [f"{row}: {int(count)} {what}" for row, count in found]
    if not texts:
        return ""
    return "Constant, so without a correlation and left out: " + "; ".join(texts) + "."


def _trained_note(frame: pd.DataFrame, target: str, unit: str) -> str:
    """Say which target each row was trained on, unless it is `target` for all of them."""
    fitted = frame[~frame["kind"].isin(["reference", "ceiling"])].drop_duplicates("row")
    if (fitted["trained_on"] == target).all() and target == MAIN_TARGET:
        return ""
    groups = fitted.groupby("trained_on", sort=False)["row"]
    texts = [f"on {target_name(str(name), unit)}: {', '.join(rows)}" for name, rows in groups]
    return f"Trained {'; '.join(texts)}."


def method(scores: Scores) -> str:
    """Say how the intervals were made."""
    if scores.n_boot == 0:
        return "No intervals were computed."
    return (
        f"In brackets: 95 % intervals over images, {scores.n_boot} bootstrap resamples shared by "
        f"all rows (seed {scores.seed}). Ceilings per {scores.info.unit} come from the repeats of "
        "the whole recording and have no interval over test images."
    )
