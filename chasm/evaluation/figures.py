"""Figures of the report: scores per region, units against their ceiling, training, brain maps."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chasm.errors import DataError
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.predictions import MAIN_TARGET
from chasm.evaluation.scores import Scores

MODEL_COLOURS = ("#0b5c8a", "#7a3b8f", "#2a7f4f")
BASELINE_COLOUR = "#d0761b"
GREY = "#7a7f87"

Volume = Callable[[NDArray[np.floating[Any]]], Any]
"""Puts one value per unit into the subject's volume: (units,) -> NIfTI image, NaN outside."""

_STYLE: dict[Any, Any] = {
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


def compared_rows(scores: Scores) -> dict[str, str]:
    """Rows that the figures compare, with their colours: the best baseline and the models."""
    frame = scores.frame[scores.frame["target"] == MAIN_TARGET]
    models = frame.loc[frame["kind"] == "model", "row"].unique()
    rows = {str(frame["best_baseline"].iloc[0]): BASELINE_COLOUR}
    for index, name in enumerate(models):
        rows[name] = MODEL_COLOURS[index % len(MODEL_COLOURS)]
    return rows


def region_figure(scores: Scores, metric: str = "noise_normalised_r2") -> Figure | None:
    """Dots with 95 % intervals for every region, groups first; None when nothing is known.

    The regions of each atlas stand together under its name.
    """
    frame = scores.frame
    rows = compared_rows(scores)
    frame = frame[
        (frame["target"] == MAIN_TARGET)
        & (frame["metric"] == metric)
        & frame["row"].isin(list(rows))
        & frame["value"].notna()
    ]
    if frame.empty:
        return None
    keys = list(dict.fromkeys(zip(frame["level"], frame["atlas"], frame["region"], strict=True)))
    heights, headings = _region_heights(keys)
    y = max(heights.values()) + 1.0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 1.1 + 0.27 * y), layout="constrained")
        axes = figure.subplots()
        for index, (name, colour) in enumerate(rows.items()):
            part = frame[frame["row"] == name]
            shift = 0.34 * (index - (len(rows) - 1) / 2)
            places = [
                heights[key] + shift
                for key in zip(part["level"], part["atlas"], part["region"], strict=True)
            ]
            axes.hlines(places, part["low"], part["high"], color=colour, lw=1.6, alpha=0.75)
            axes.plot(part["value"], places, "o", color=colour, ms=4.5, label=name)
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
        axes.axvline(0, color="#9aa0a8", lw=0.8)
        if metric.startswith("noise_normalised"):
            axes.axvline(1, color="#9aa0a8", lw=0.8, ls=":")
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, -0.6), min(max(high, 1.03), 1.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e8eb", lw=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(label_of(metric, scores.info.unit))
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


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
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 4.2), layout="constrained")
        axes = figure.subplots()
        size = float(np.clip(3000 / known.sum(), 1.5, 22))
        for name, colour in compared_rows(scores).items():
            axes.scatter(
                scores.unit_ceiling[known],
                scores.unit_r2[name][known],
                s=size,
                color=colour,
                alpha=0.6,
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
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
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
    with mpl.rc_context(_STYLE):
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


def brain_figure(
    values: NDArray[np.floating[Any]],
    volume: Volume,
    title: str,
    *,
    background: Any = None,
    symmetric: bool = False,
) -> Figure:
    """Axial slices through one value per unit in the subject's own volume.

    Parameters
    ----------
    values
        (units,).
    volume
        Puts them into a NIfTI image.
    title
        Shown beside the colour scale.
    background
        NIfTI image drawn beneath, e.g. the mean EPI; None for white.
    symmetric
        Whether the colours are centred on 0.
    """
    from nilearn.plotting import find_cut_slices, plot_stat_map

    image = _cropped(volume(values))
    data = np.asarray(image.dataobj, dtype=np.float64)
    inside = np.isfinite(data)
    limit = float(np.nanpercentile(np.abs(data), 99)) or 1.0
    low = -limit if symmetric else 0.0
    # nilearn hides what is 0; a value of 0 inside must stay visible.
    shown = np.where(inside, np.where(data == 0, 1e-6 * limit, data), 0.0)
    cover = type(image)(inside.astype(np.float32), image.affine)
    colours = mpl.colormaps["RdBu_r" if symmetric else "viridis"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 2.1))
        display = plot_stat_map(
            type(image)(shown.astype(np.float32), image.affine),
            bg_img=background,
            figure=figure,
            axes=(0.0, 0.0, 0.91, 1.0),
            display_mode="z",
            cut_coords=find_cut_slices(cover, direction="z", n_cuts=6),
            cmap=colours,
            vmin=low,
            vmax=limit,
            threshold=1e-8 * limit,
            black_bg=False,
            draw_cross=False,
            annotate=False,
            colorbar=False,
        )
        display.annotate(size=9)
        display.add_contours(cover, levels=[0.5], colors=["#777"], linewidths=0.4)
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(low, limit), colours)
        bar = figure.colorbar(scale, cax=figure.add_axes((0.925, 0.14, 0.012, 0.72)))
        bar.set_label(title, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    return figure


def _cropped(image: Any, margin: int = 8) -> Any:
    """Cut a NIfTI image to the box around its finite voxels."""
    data = np.asarray(image.dataobj)
    where = np.argwhere(np.isfinite(data))
    first = np.maximum(where.min(axis=0) - margin, 0)
    last = np.minimum(where.max(axis=0) + margin + 1, data.shape)
    return image.slicer[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element to put into a page, the same bytes each time."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=150)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG at 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
