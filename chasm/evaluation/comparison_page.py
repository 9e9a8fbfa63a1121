"""The comparison as one HTML page that needs nothing beside it."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from chasm.evaluation import figures, tables, wording
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.comparison_tables import (
    Comparison,
    Level,
    best_linear,
    comparison_grid,
    deciding_metric,
    failure_lines,
    findings,
    further_grids,
)
from chasm.evaluation.page import fill

COLOURS = {
    "model": figures.MODEL_COLOURS[0],
    "baseline": figures.BASELINE_COLOUR,
    "reference": figures.GREY,
    "ceiling": figures.GREY,
}
"""Of the dots of each kind of row."""


def render(comparison: Comparison) -> str:
    """Make the page of a comparison with at least one level."""
    first = comparison.levels[0]
    context = {
        "info": first.scores.info,
        "headline": tables.headline(first.scores),
        "levels": [_section(level) for level in comparison.levels],
        "failures": failure_lines(comparison.failed),
        "metrics": wording.metric_facts(first.scores.info.unit),
        "published": tables.published_grid(),
        "prints": {
            f"fingerprint of the {name}": value
            for name, value in first.file.info.fingerprints.items()
        },
    }
    return fill("comparison.html.j2", context)


def _section(level: Level) -> dict[str, Any]:
    return {
        "name": f"{level.scores.info.unit}s",
        "headline": tables.headline(level.scores),
        "findings": findings(level),
        "method": tables.method(level.scores),
        "figure": figures.to_svg(rows_figure(level)),
        "grid": comparison_grid(level),
        "further": further_grids(level),
        "rows": wording.row_facts(level.file),
    }


def rows_figure(level: Level) -> Figure:
    """Draw every row as a dot with its 95 % interval, the best linear row as a dashed line."""
    scores = level.scores
    metric, best = deciding_metric(scores), best_linear(scores)
    frame = scores.frame
    frame = frame[(frame["level"] == "all") & (frame["metric"] == metric)]
    frame = frame[frame["value"].notna() & (frame["kind"] != "ceiling")]
    places = range(len(frame))
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.27 * len(frame)), layout="constrained")
        axes = figure.subplots()
        for place, (_, line) in zip(places, frame.iterrows(), strict=True):
            colour = COLOURS[line["kind"]]
            axes.hlines(place, line["low"], line["high"], color=colour, lw=1.6, alpha=0.75)
            axes.plot(line["value"], place, "o", color=colour, ms=4.5)
        reference = float(frame.loc[frame["row"] == best, "value"].iloc[0])
        axes.axvline(reference, color=figures.BASELINE_COLOUR, lw=0.8, ls="--")
        axes.axvline(0, color="#9aa0a8", lw=0.8)
        axes.set_yticks(list(places), list(frame["row"]))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e8eb", lw=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{label_of(metric, scores.info.unit)} (dashed: {best})")
    return figure
