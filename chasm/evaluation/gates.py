"""How a dual-stream model mixes its streams: the gate over images, and over areas."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chasm.evaluation.figures import GREY, MODEL_COLOURS, STYLE, region_axes
from chasm.evaluation.grids import Grid, Line, number
from chasm.evaluation.prediction_parts import FloatArray
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.regions import Region, weight_matrix, weighted_mean


def image_shares(file: PredictionFile) -> FloatArray | None:
    """Share of the global stream in the prediction of every image, (images,).

    The mean over parcels where each has a gate of its own; None for a model without a gate.
    """
    if file.gate is None:
        return None
    shares: FloatArray = np.mean(file.gate[..., 0], axis=1, dtype=np.float64)
    return shares


def unit_shares(file: PredictionFile) -> FloatArray | None:
    """Share of the global stream for every image and unit, (images, units).

    A voxel has that of its parcel, NaN without one. None for a model without a gate, or with
    one gate for all parcels.
    """
    if file.gate is None or file.gate.shape[1] == 1:
        return None
    shares: FloatArray = file.gate[..., 0]
    if file.info.unit == "parcel" or file.parcel_labels is None:
        return shares
    labels = file.parcel_labels
    return np.where(labels >= 0, shares[:, np.maximum(labels, 0)], np.nan)


def gate_table(file: PredictionFile, regions: Sequence[Region]) -> pd.DataFrame | None:
    """Describe the share of the global stream in every region.

    Returns
    -------
    DataFrame or None
        level, atlas, region; mean over images and units; low and high: where 95 % of images
        lie, each image by its mean over the region's units; sd_images: standard deviation of
        those; sd_units: that over units of their mean over images. For one gate per image only
        all units, without sd_units; None without a gate.
    """
    per_image = image_shares(file)
    if per_image is None:
        return None
    per_unit = unit_shares(file)
    if per_unit is None:
        regions = [region for region in regions if region.level == "all"]
        by_region, spread = per_image[:, None], np.full((1, 1), np.nan)
    else:
        weights = weight_matrix(regions)
        by_region = weighted_mean(per_unit, weights)
        units = per_unit.mean(axis=0, dtype=np.float64)
        centre = weighted_mean(units[None], weights)[0]
        squares = np.stack([np.square(units - middle) for middle in centre])
        spread = np.sqrt(np.diagonal(weighted_mean(squares, weights)))[None]
    low, high = np.percentile(by_region, [2.5, 97.5], axis=0)
    frame = pd.DataFrame(
        {
            "level": [region.level for region in regions],
            "atlas": [region.atlas for region in regions],
            "region": [region.name for region in regions],
            "mean": by_region.mean(axis=0),
            "low": low,
            "high": high,
            "sd_images": by_region.std(axis=0),
            "sd_units": spread[0],
        }
    )
    return frame[frame["mean"].notna()]


def gate_grid(frame: pd.DataFrame, unit: str) -> Grid:
    """Show all units and the groups."""
    shown = frame[frame["level"].isin(["all", "group"])]
    one = bool(frame["sd_units"].isna().all())
    lines = [
        Line(
            str(line["region"]),
            "",
            (
                f"{line['mean']:.3f}",
                f"{line['low']:.3f} to {line['high']:.3f}",
                f"{line['sd_images']:.3f}",
                number(line["sd_units"]),
            ),
        )
        for _, line in shown.iterrows()
    ]
    return Grid(
        "Share of the global stream",
        ("Mean", "95 % of images", "SD over images", f"SD over {unit}s"),
        tuple(lines),
        "1: the prediction comes from the CLS tokens alone; 0: from the patch tokens alone."
        + (" There is one gate per image, the same for all parcels." if one else ""),
    )


def image_figure(shares: FloatArray) -> Figure:
    """Histogram of the share of the global stream over images: (images,)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.hist(shares, bins=30, color=MODEL_COLOURS[0], alpha=0.85)
        axes.axvline(float(shares.mean()), color=GREY, lw=1, ls="--")
        # A gate that hardly varies would otherwise look as if it did.
        low, high = float(shares.min()), float(shares.max())
        margin = max(0.1 - (high - low), 0) / 2 + 0.01
        axes.set_xlim(max(0.0, low - margin), min(1.0, high + margin))
        axes.set_xlabel("Share of the global stream (dashed: mean over images)")
        axes.set_ylabel("Test images")
    return figure


def region_figure(frame: pd.DataFrame) -> Figure | None:
    """Mean share of every region, bars over 95 % of images; None for one gate per image."""
    if len(frame) < 2:
        return None
    keys = list(zip(frame["level"], frame["atlas"], frame["region"], strict=True))
    with mpl.rc_context(STYLE):
        figure, axes, heights = region_axes(keys)
        places = [heights[key] for key in keys]
        axes.hlines(places, frame["low"], frame["high"], color=MODEL_COLOURS[0], lw=1.6, alpha=0.5)
        axes.plot(frame["mean"], places, "o", color=MODEL_COLOURS[0], ms=4.5)
        axes.set_xlim(0, 1)
        axes.axvline(0.5, color="#9aa0a8", lw=0.8, ls=":")
        axes.set_xlabel("Share of the global stream")
    return figure
