"""The curve over the number of images as a figure, and as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chasm.evaluation import figures, tables, wording
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.page import fill
from chasm.evaluation.transfer_arms import ARMS
from chasm.evaluation.transfer_tables import (
    Curve,
    curve_frame,
    findings,
    grids,
    headline,
    notes,
)

LOOKS = {
    "mean_pattern": (figures.GREY, ":", "s"),
    "ridge": (figures.BASELINE_COLOUR, "-", "o"),
    "banded_ridge": (figures.BASELINE_COLOUR, "--", "o"),
    "ridge_head": (figures.MODEL_COLOURS[0], "-", "D"),
    "head": (figures.MODEL_COLOURS[1], "-", "^"),
    "lora": (figures.MODEL_COLOURS[2], "-", "v"),
    "full": ("#a8324a", "-", "P"),
}
"""Colour, line and marker of every arm."""

_HEADROOM = 1.9
"""A ceiling further above the curves than this factor is named at the edge, not drawn."""


_APART = 1.25
"""Numbers of images closer than this factor share a label."""


def curve_figure(curve: Curve) -> Figure:
    """Draw three metrics against the number of images, with intervals and the ceiling."""
    frame = curve_frame(curve.cells)
    metrics = (curve.metric, "pattern_correlation", "voxelwise_correlation_mean")
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(11.4, 4.5), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 3), metrics, strict=True):
            _draw(axes, frame[frame["metric"] == metric], curve.ceiling[metric])
            axes.set_ylabel(label_of(metric, curve.info.unit))
        handles = {h.get_label(): h for axes in figure.axes for h in axes.get_lines()}
        named = {ARMS[arm].label: handles[ARMS[arm].label] for arm in ARMS if arm in _arms(frame)}
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=len(named), fontsize=9
        )
        simulated = "SIMULATED · " if curve.info.simulated else ""
        figure.suptitle(
            f"{simulated}{', '.join(curve.sources)} → {curve.info.subject}: "
            f"{curve.n_images} test images, 95 % intervals over them",
            fontsize=11,
            fontweight="bold" if curve.info.simulated else "normal",
        )
    return figure


def _arms(frame: pd.DataFrame) -> set[str]:
    return set(frame["arm"])


def _draw(axes: Axes, part: pd.DataFrame, ceiling: float) -> None:
    numbers = sorted(part["n"].unique())
    arms = [arm for arm in ARMS if arm in _arms(part)]
    for index, arm in enumerate(arms):
        own = part[(part["arm"] == arm) & part["value"].notna()]
        colour, line, marker = LOOKS[arm]
        places = own["n"] * 1.025 ** (index - (len(arms) - 1) / 2)  # side by side on a log axis
        axes.vlines(places, own["low"], own["high"], color=colour, lw=1.2, alpha=0.6)
        axes.plot(
            places, own["value"], line, color=colour, marker=marker, ms=4.5, lw=1.5,
            label=ARMS[arm].label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(numbers, _labels(numbers), fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("Images of the new subject (N)")
    axes.axhline(0, color="#9aa0a8", lw=0.8)
    axes.grid(color="#eceef1", lw=0.7)
    axes.set_axisbelow(True)
    if np.isfinite(ceiling):
        _draw_ceiling(axes, ceiling, float(part["high"].fillna(part["value"]).max()))


def _labels(numbers: Sequence[int]) -> list[str]:
    """Leave out the label of a number that the next one would cover."""
    following = [*numbers[1:], np.inf]
    pairs = zip(numbers, following, strict=True)
    return [str(n) if after > _APART * n else "" for n, after in pairs]


def _draw_ceiling(axes: Axes, ceiling: float, top: float) -> None:
    place = axes.get_yaxis_transform()
    if ceiling > _HEADROOM * top:
        axes.set_ylim(top=1.12 * top)
        text, height = f"noise ceiling {ceiling:.2f} ↑", 1.0
        place = axes.transAxes
    else:
        axes.axhline(ceiling, color=figures.GREY, lw=1, ls="--")
        text, height = f"noise ceiling {ceiling:.2f}", ceiling
    axes.annotate(
        text, (0.02, height), (0, -3), xycoords=place, textcoords="offset points",
        va="top", color=figures.GREY, fontsize=9,
    )  # fmt: skip


def render_curve(curve: Curve, figure: str, facts: Mapping[str, Any]) -> str:
    """Make the page of a curve.

    Parameters
    ----------
    curve
        What it shows.
    figure
        `curve_figure` as an SVG element.
    facts
        Where it comes from.
    """
    first, *others = grids(curve)
    context = {
        "info": curve.info,
        "title": f"Few images of {curve.info.subject}",
        "headline": headline(curve.info, curve.n_images),
        "findings": findings(curve),
        "notes": notes(curve),
        "figure": figure,
        "grids": [first, *others[:-1]],
        "arms": others[-1],
        "metrics": wording.metric_facts(curve.info.unit),
        "published": tables.published_grid(),
        "facts": {name: str(value) for name, value in facts.items()},
    }
    return fill("transfer.html.j2", context)
