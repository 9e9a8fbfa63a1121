"""Figures of the report: scores per region, units against their ceiling, training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chasm.errors import DataError
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.prediction_parts import MAIN_TARGET, FloatArray
from chasm.evaluation.scores import Scores

MODEL_COLOURS = ("#0b5c8a", "#7a3b8f", "#2a7f4f")
COMPONENT_COLOURS = ("#6fa8c9", "#b08fc0")
BASELINE_COLOUR = "#d0761b"
GREY = "#7a7f87"

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#333",
    "xtick.color": "#555",
    "ytick.color": "#333",
    "svg.hashsalt": "chasm",
    "figure.facecolor": "white",
}


def compared_rows(scores: Scores, *, components: bool = False) -> dict[str, str]:
    """Rows that the figures compare, with their colours: the best baseline and the models.

    With `components`, also the models' parts, between the two.
    """
    frame = scores.frame[scores.frame["target"] == MAIN_TARGET]
    rows = {str(frame["best_baseline"].iloc[0]): BASELINE_COLOUR}
    kinds = {"component": COMPONENT_COLOURS} if components else {}
    for kind, colours in (kinds | {"model": MODEL_COLOURS}).items():
        names = frame.loc[frame["kind"] == kind, "row"].unique()
        rows |= {str(name): colours[i % len(colours)] for i, name in enumerate(names)}
    return rows


def region_figure(scores: Scores, metric: str = "noise_normalised_r2") -> Figure | None:
    """Dots with 95 % intervals for every region, groups first; None for a single region.

    The regions of each atlas stand together under its name.
    """
    frame = scores.frame
    rows = compared_rows(scores, components=True)
    frame = frame[
        (frame["target"] == MAIN_TARGET)
        & (frame["metric"] == metric)
        & frame["row"].isin(list(rows))
        & frame["value"].notna()
    ]
    keys = list(dict.fromkeys(zip(frame["level"], frame["atlas"], frame["region"], strict=True)))
    if len(keys) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure, axes, heights = region_axes(keys)
        for index, (name, colour) in enumerate(rows.items()):
            part = frame[frame["row"] == name]
            shift = 0.34 * (index - (len(rows) - 1) / 2) * min(1, 2 / len(rows))
            places = [
                heights[key] + shift
                for key in zip(part["level"], part["atlas"], part["region"], strict=True)
            ]
            axes.hlines(places, part["low"], part["high"], color=colour, lw=1.6, alpha=0.75)
            axes.plot(part["value"], places, "o", color=colour, ms=4.5, label=name)
        axes.axvline(0, color="#9aa0a8", lw=0.8)
        if metric.startswith("noise_normalised"):
            axes.axvline(1, color="#9aa0a8", lw=0.8, ls=":")
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, -0.6), min(max(high, 1.03), 1.6))
        axes.set_xlabel(label_of(metric, scores.info.unit))
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def region_axes(
    keys: Sequence[tuple[str, str, str]],
) -> tuple[Figure, Axes, dict[tuple[str, str, str], float]]:
    """Make axes with one line per (level, atlas, region); give the heights of the lines, too."""
    heights, headings = _region_heights(keys)
    y = max(heights.values()) + 1.0
    figure = Figure(figsize=(5.4, 1.1 + 0.27 * y), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(list(heights.values()), [region for _, _, region in heights])
    for atlas, height in headings.items():
        axes.annotate(
            atlas,
            (0, height),
            (-3.5, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold",
            color=GREY,
        )
    axes.set_ylim(y - 0.3, -0.9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e8eb", lw=0.7)
    axes.set_axisbelow(True)
    return figure, axes, heights


def _region_heights(
    keys: Sequence[tuple[str, str, str]],
) -> tuple[dict[tuple[str, str, str], float], dict[str, float]]:
    """Places on the y axis of every (level, atlas, region), and of each atlas' heading."""
    heights: dict[tuple[str, str, str], float] = {}
    headings: dict[str, float] = {}
    y, previous = 0.0, keys[0]
    for key in keys:
        level, atlas, _ = key
        if key[:2] != previous[:2]:
            y += 0.4
            if level == "roi":
                headings[atlas] = y
                y += 0.9
        heights[key] = y
        y, previous = y + 1.0, key
    return heights, headings


def ceiling_figure(scores: Scores) -> Figure | None:
    """R² of every unit against its noise ceiling; None when no ceiling is known."""
    known = np.isfinite(scores.unit_ceiling)
    if not known.any():
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 4.2), layout="constrained")
        axes = figure.subplots()
        size = float(np.clip(6000 / known.sum(), 2, 22))
        for name, colour in compared_rows(scores).items():
            axes.scatter(
                scores.unit_ceiling[known],
                scores.unit_r2[name][known],
                s=size,
                color=colour,
                alpha=0.5,
                lw=0,
                label=name,
                rasterized=True,
            )
        top = float(np.nanmax(scores.unit_ceiling)) * 1.05
        axes.plot([0, top], [0, top], color=GREY, lw=1, ls="--")
        axes.annotate(
            "ceiling", (top, top), (-4, -26), textcoords="offset points", ha="right", color=GREY
        )
        axes.axhline(0, color="#9aa0a8", lw=0.8)
        axes.set_xlim(0, top)
        axes.set_xlabel(f"Noise ceiling of the {scores.info.unit} (r²)")
        axes.set_ylabel("R² on test images")
        legend = figure.legend(
            loc="outside upper left", ncols=3, frameon=False, markerscale=(22 / size) ** 0.5
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)
    return figure


def spread_figure(drawn: FloatArray, repeated: FloatArray, unit: str) -> Figure | None:
    """Variance over draws against variance over repeats, a dot per unit; None without both.

    Parameters
    ----------
    drawn, repeated
        (units,), see `chasm.evaluation.sampling.unit_variances`.
    unit
        What a dot is.
    """
    shown = (drawn > 0) & (repeated > 0)
    if not shown.any():
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 4.0), layout="constrained")
        axes = figure.subplots()
        size = float(np.clip(6000 / shown.sum(), 2, 18))
        axes.scatter(
            repeated[shown], drawn[shown], s=size, color=MODEL_COLOURS[0], alpha=0.5, lw=0,
            rasterized=True,
        )  # fmt: skip
        low, high = repeated[shown].min(), repeated[shown].max()
        ends = np.array([0.9 * low, high + 0.1 * low])
        axes.plot(ends, ends, color=GREY, lw=1, ls="--", label="draws spread as repeats do")
        axes.set_yscale("log")
        axes.set_xlim(*ends)
        figure.legend(loc="outside upper left", frameon=False)
        axes.set_xlabel(f"Variance over repeats of an image ({unit})")
        axes.set_ylabel("Variance over draws")
    return figure


def training_figures(metrics_csv: Path) -> list[Figure]:
    """Training curves from Lightning's ``metrics.csv``, one figure per quantity.

    Columns ``train/x`` (or ``train_x``) and ``val/x`` share a figure.

    Raises
    ------
    DataError
        If the file is missing or has no column ``epoch``.
    """
    path = Path(metrics_csv)
    if not path.is_file():
        raise DataError(path, "no such file", "Give the metrics.csv of a finished run.")
    frame = pd.read_csv(path)
    if "epoch" not in frame:
        raise DataError(f"{path}:epoch", "no such column", "Give Lightning's metrics.csv.")
    drawn = []
    with mpl.rc_context(STYLE):
        for name, parts in _curves(frame).items():
            figure = Figure(figsize=(4.6, 2.6), layout="constrained")
            _draw_curves(figure.subplots(), name, parts)
            drawn.append(figure)
    return drawn


def _curves(frame: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """Panel name to phase to values by epoch, the loss first, constant columns left out."""
    found: dict[str, dict[str, pd.Series]] = {}
    for column in frame.columns:
        for phase in ("train", "val"):
            name = str(column).removeprefix(f"{phase}/").removeprefix(f"{phase}_")
            if name == column or name.endswith("_step"):
                continue
            values = frame.groupby("epoch")[column].mean().dropna()
            if len(values) > 1:
                panel = name.removesuffix("_epoch").replace("_", " ")
                found.setdefault(panel, {})[phase] = values
    return dict(sorted(found.items(), key=lambda item: (item[0] not in ("loss", "total"), item[0])))


def _draw_curves(axes: Axes, name: str, parts: Mapping[str, pd.Series]) -> None:
    for phase, values in parts.items():
        colour = GREY if phase == "train" else MODEL_COLOURS[0]
        label = "validation" if phase == "val" else "train"
        axes.plot(values.index, values, color=colour, lw=1.6, label=label)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("epoch")
    axes.grid(color="#e6e8eb", lw=0.7)
    axes.legend(frameon=False, fontsize=8)


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element to put into a page, the same bytes each time."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=150)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG at 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
