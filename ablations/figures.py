"""Figures of the ablation: effects by region, and early against higher regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.findings import Findings
from ablations.region_tables import KEYS, Column, by_region, lookup
from ablations.tables import set_rows
from chasm.evaluation.figures import BASELINE_COLOUR, GREY, MODEL_COLOURS, STYLE, region_axes

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
    colours = {"model": iter(MODEL_COLOURS * len(encoders)), "linear": None}
    return {
        name: BASELINE_COLOUR if kind == "linear" else next(colours["model"] or iter(()))
        for name, kind in encoders.items()
    }


def specialisation_figure(findings: Findings) -> Figure | None:
    """D of every region in every encoder, the planted D beside it; None for a single region."""
    series = {
        name: (_rows(findings, name, "specialisation"), colour)
        for name, colour in encoder_colours(findings.encoders).items()
    }
    figure = _region_figure(series, f"{findings.mark}D = v(L) − v(G), {_unit(findings)}")
    if figure is None:
        return None
    axes = figure.axes[0]
    for x, text in ((0.0, "← more through CLS"), (1.0, "more through patches →")):
        axes.annotate(
            text, (x, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
            ha="left" if x == 0 else "right", fontsize=8, color=GREY,
        )  # fmt: skip
    return figure
