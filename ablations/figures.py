"""Figures of the ablation: effects by region, and early against higher regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.findings import Findings
from ablations.region_tables import Column, by_region, lookup
from ablations.tables import set_rows
from ablations.wording import SCALE_NAMES
from chasm.evaluation.figures import BASELINE_COLOUR, GREY, MODEL_COLOURS, STYLE, region_axes

PLANTED = "planted"
"""Label of the diamonds in `specialisation_figure`."""

LOCAL_COLOUR, GLOBAL_COLOUR = "#2a7f4f", "#7a3b8f"
"""Of what belongs to the local stream, and to the global stream."""

QUADRANTS: Mapping[tuple[float, float], str] = {
    (0.03, 0.97): "early local,\nhigher global",
    (0.97, 0.97): "local everywhere",
    (0.03, 0.03): "global everywhere",
    (0.97, 0.03): "early global,\nhigher local",
}
"""Names of the quadrants of `plane_figure`, by the corner of the axes that they stand in."""


def encoder_colours(encoders: Mapping[str, str]) -> dict[str, str]:
    """Colour of every encoder: models in the models' colours, linear ones in the baselines'."""
    colours = {"model": cycle(MODEL_COLOURS), "linear": cycle([BASELINE_COLOUR])}
    return {name: next(colours[kind]) for name, kind in encoders.items()}


def specialisation_figure(findings: Findings, scale: str = "") -> Figure | None:
    """D of every region in every encoder; None for a single region.

    Parameters
    ----------
    findings
        What was found.
    scale
        Which; by default the main one. In shares, the planted D stands beside where it is known.
    """
    scale = scale or findings.scale
    column = Column("", "specialisation")
    series = {
        name: (lookup(by_region(findings.rows(name)), column, scale), Mark(colour))
        for name, colour in encoder_colours(findings.encoders).items()
    }
    if scale == "share":
        series |= _planted(findings, next(iter(series.values()))[0])
    figure = _region_figure(series, f"{findings.mark}D, {SCALE_NAMES[scale]}")
    if figure is not None:
        for x, text in ((0.0, "← more through CLS"), (1.0, "more through patches →")):
            figure.axes[0].annotate(
                text, (x, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
                ha="left" if x == 0 else "right", fontsize=8, color=GREY,
            )  # fmt: skip
    return figure


def contribution_figure(findings: Findings, encoder: str) -> Figure | None:
    """φ and N of both streams in every region; None for a single region."""
    rows = by_region(findings.rows(encoder))
    series = {
        f"{sign} {stream}": (lookup(rows, Column("", f"{name}_{stream}"), findings.scale), mark)
        for stream, colour in (("local", LOCAL_COLOUR), ("global", GLOBAL_COLOUR))
        for sign, name, mark in (
            ("φ", "shapley", Mark(colour)),
            ("N", "necessity", Mark(colour, face="white")),
        )
    }
    label = f"{findings.mark}{encoder}, {SCALE_NAMES[findings.scale]}"
    return _region_figure(series, label)


def plane_figure(findings: Findings) -> Figure | None:
    """D of the early set against D of the higher set, an encoder a dot; None without the sets.

    Small dots are single training seeds.
    """
    points = {
        name: [_point(set_rows(findings, name, seed), findings.scale) for seed in (None, *seeds)]
        for name in findings.encoders
        for seeds in [findings.seeds(name)]
    }
    points = {name: found for name, found in points.items() if found[0] is not None}
    if not points:
        return None
    colours = encoder_colours(findings.encoders)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.2), layout="constrained")
        axes = figure.subplots()
        for name, found in points.items():
            pooled, *single = [point for point in found if point is not None]
            _draw_point(axes, pooled, colours[name], name)
            if len(single) > 1:
                x, y = (part["value"] for part in _sides(single))
                axes.plot(x, y, "o", color=colours[name], ms=3, alpha=0.6)
        _quadrants(axes, [point for found in points.values() for point in found if point])
        axes.set_xlabel(f"D higher, {SCALE_NAMES[findings.scale]}")
        axes.set_ylabel(f"{findings.mark}D early")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


class Mark(NamedTuple):
    """How a series is drawn."""

    colour: str
    shape: str = "o"
    face: str = ""


Series = Mapping[str, tuple[pd.DataFrame, Mark]]
"""Label to rows with ``value``, ``low``, ``high`` by region, and how they are drawn."""


def _planted(findings: Findings, like: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, Mark]]:
    """Planted D in shares of the regions of a table; empty where it is not known."""
    if not findings.planted:
        return {}
    like = like.dropna(subset=["value"])
    values = [2 * findings.planted_share(key[1], key[2]) - 1 for key in like.index]
    table = pd.DataFrame({"value": values, "low": values, "high": values}, index=like.index)
    return {PLANTED: (table, Mark("#1d2126", "D", "none"))}


def _region_figure(series: Series, label: str) -> Figure | None:
    """Dots with intervals for every region of several tables; None for a single region."""
    tables = {name: table.dropna(subset=["value"]) for name, (table, _) in series.items()}
    scored = {key for table in tables.values() for key in table.index}
    ordered = dict.fromkeys(key for table, _ in series.values() for key in table.index)
    keys = [key for key in ordered if key in scored]
    if len(keys) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure, axes, heights = region_axes(keys)
        moved = [name for name in tables if name != PLANTED]
        for name, table in tables.items():
            mark = series[name][1]
            index = moved.index(name) if name in moved else (len(moved) - 1) / 2
            shift = 0.4 * (index - (len(moved) - 1) / 2) * min(1, 2 / len(moved))
            places = [heights[key] + shift for key in table.index]
            axes.hlines(places, table["low"], table["high"], color=mark.colour, lw=1.5, alpha=0.75)
            axes.plot(
                table["value"], places, mark.shape, color=mark.colour, ms=4.5, label=name,
                markerfacecolor=mark.face or mark.colour,
            )  # fmt: skip
        axes.axvline(0, color="#9aa0a8", lw=0.8)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


Point = dict[str, pd.Series]
"""Rows of D of the sets ``early`` and ``higher``."""


def _point(rows: pd.DataFrame, scale: str) -> Point | None:
    """D of both sets on a scale; None unless both have a number."""
    part = rows[(rows["scale"] == scale) & (rows["quantity"] == "specialisation")]
    found = {str(row["region"]): row for _, row in part.iterrows()}
    return found if {"early", "higher"} <= set(found) else None


def _sides(points: Iterable[Point]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the x axis, and of the y axis."""
    return tuple(pd.DataFrame([p[side] for p in points]) for side in ("higher", "early"))  # type: ignore[return-value]


def _draw_point(axes: Axes, point: Point, colour: str, label: str) -> None:
    x, y = point["higher"], point["early"]
    axes.hlines(y["value"], x["low"], x["high"], color=colour, lw=1.5, alpha=0.75)
    axes.vlines(x["value"], y["low"], y["high"], color=colour, lw=1.5, alpha=0.75)
    axes.plot(x["value"], y["value"], "o", color=colour, ms=7, label=label)


def _quadrants(axes: Axes, points: Sequence[Point]) -> None:
    """Name the quadrants, draw their borders and the line of no asymmetry, centre the view."""
    rows = pd.DataFrame([row for point in points for row in point.values()])
    limit = 1.35 * float(np.nanmax(np.abs(rows[["value", "low", "high"]].to_numpy(float)))) or 1.0
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.axhline(0, color="#9aa0a8", lw=0.8)
    axes.axvline(0, color="#9aa0a8", lw=0.8)
    axes.plot([-limit, limit], [-limit, limit], color=GREY, lw=0.8, ls="--")
    axes.annotate(
        "I = 0", (0.7 * limit, 0.7 * limit), (6, -4), textcoords="offset points", fontsize=8,
        color=GREY, va="top",
    )  # fmt: skip
    for (x, y), text in QUADRANTS.items():
        axes.text(
            x, y, text, transform=axes.transAxes, fontsize=8.5, color=GREY,
            ha="left" if x < 0.5 else "right", va="bottom" if y < 0.5 else "top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )  # fmt: skip
