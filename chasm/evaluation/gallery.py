"""The test images that a model predicts best and worst, with their patterns."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import nibabel
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from chasm.errors import DataError
from chasm.evaluation.brain_maps import Volume, cropped
from chasm.evaluation.figures import GREY, MODEL_COLOURS, STYLE, to_png
from chasm.evaluation.patterns import pattern_scores
from chasm.evaluation.predictions import PredictionFile

logger = logging.getLogger(__name__)

Pixels = Callable[[NDArray[np.int64]], list[NDArray[np.uint8]]]
"""Reads images by id: uint8 (height, width, 3) each."""

N_EXAMPLES = 4
"""Images at each end."""

THUMBNAIL = 200
"""Longest side of an embedded image, pixels."""

_SLICES = 4


@dataclass(frozen=True)
class Example:
    """One test image.

    Attributes
    ----------
    image_id
        0-based row of the stimulus file.
    pattern_correlation, centred
        Of prediction and measurement across units, plain and without the train mean pattern.
    repeats
        Presentations behind the measured pattern.
    picture
        Data URI of the image, empty where its pixels are not at hand.
    patterns
        Data URI of the measured and the predicted pattern.
    """

    image_id: int
    pattern_correlation: float
    centred: float
    repeats: int
    picture: str
    patterns: str


@dataclass(frozen=True)
class Gallery:
    """The images at both ends of a model's pattern correlations, best and worst first."""

    row: str
    best: tuple[Example, ...]
    worst: tuple[Example, ...]


def make_gallery(
    file: PredictionFile, volume: Volume | None, pixels: Pixels | None, n: int = N_EXAMPLES
) -> Gallery | None:
    """Choose images by the pattern correlation of the first model, and draw them.

    Parameters
    ----------
    file
        The predictions.
    volume
        Puts one value per unit into the subject's volume; without it patterns are drawn as
        sorted profiles.
    pixels
        Reads the images; without it, or where it cannot, there are only patterns.
    n
        Images at each end, fewer where the test set is small.

    Returns
    -------
    Gallery or None
        None without a model, or without two images that have a pattern correlation.
    """
    name = next((name for name, row in file.rows.items() if row.kind == "model"), None)
    if name is None:
        return None
    predicted = file.rows[name].values
    scores = pattern_scores(predicted, file.target, file.train_mean)
    r, centred = scores["pattern_correlation"], scores["pattern_correlation_centred"]
    ranked = np.argsort(-r, kind="stable")
    ranked = ranked[np.isfinite(r[ranked])]
    n = min(n, len(ranked) // 2)
    if n == 0:
        return None
    chosen = np.concatenate([ranked[:n], ranked[::-1][:n]])
    pictures = _pictures(file.image_id[chosen], pixels)
    examples = [
        Example(
            int(file.image_id[image]),
            float(r[image]),
            float(centred[image]),
            int(file.repeats[image]),
            picture,
            _uri(to_png(pattern_figure(file.target[image], predicted[image], volume)), "png"),
        )
        for image, picture in zip(chosen, pictures, strict=True)
    ]
    return Gallery(name, tuple(examples[:n]), tuple(examples[n:]))


def _pictures(image_ids: NDArray[np.int64], pixels: Pixels | None) -> list[str]:
    if pixels is None:
        return [""] * len(image_ids)
    try:
        return [thumbnail(image) for image in pixels(image_ids)]
    except DataError as error:
        logger.warning("the report has no pixels: %s", error)
        return [""] * len(image_ids)


def thumbnail(image: NDArray[np.uint8], side: int = THUMBNAIL) -> str:
    """Give a small JPEG of an image, (height, width, 3) uint8, as a data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _uri(buffer.getvalue(), "jpeg")


def pattern_figure(
    measured: NDArray[np.floating[Any]],
    predicted: NDArray[np.floating[Any]],
    volume: Volume | None,
) -> Figure:
    """Draw a measured and a predicted pattern, (units,) each, in the volume or as profiles."""
    with mpl.rc_context(STYLE):
        if volume is None:
            return _profile_figure(measured, predicted)
        return _slice_figure(measured, predicted, volume)


def _slice_figure(
    measured: NDArray[np.floating[Any]], predicted: NDArray[np.floating[Any]], volume: Volume
) -> Figure:
    """Axial slices, right of the subject on the right; each pattern on its own scale."""
    images = [
        nibabel.as_closest_canonical(cropped(volume(values), margin=1))
        for values in (measured, predicted)
    ]
    affine = images[0].affine
    patterns = [np.asarray(image.dataobj, dtype=np.float64) for image in images]
    limits = [float(np.nanpercentile(np.abs(pattern), 98)) or 1.0 for pattern in patterns]
    levels = _levels(np.isfinite(patterns[0]))
    across, along = patterns[0].shape[:2]
    side, top, width = 0.5, 0.2, 5.0  # inches: beside and above the slices, and all
    height = 2 * (width - side) / len(levels) * along / across + top
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((side / width, 0.0, 1 - side / width, 1 - top / height))
    axes.set_axis_off()
    rows = [
        np.concatenate([pattern[:, :, level].T for level in levels], axis=1) / limit
        for pattern, limit in zip(patterns, limits, strict=True)
    ]
    mosaic = np.concatenate(rows[::-1])  # drawn from the bottom
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#dfe2e6")
    axes.imshow(
        np.ma.masked_invalid(mosaic), origin="lower", cmap=colours, vmin=-1, vmax=1,
        interpolation="nearest", aspect="auto",
    )  # fmt: skip
    axes.hlines(along - 0.5, -0.5, mosaic.shape[1] - 0.5, color="white", lw=2)
    axes.vlines(np.arange(1, len(levels)) * across - 0.5, -0.5, 2 * along - 0.5, "white", lw=2)
    for place, level in enumerate(levels):
        z = (affine @ [0, 0, level, 1])[2]
        axes.text((place + 0.5) * across, 2 * along, f"z = {z:.0f} mm", ha="center", va="bottom",
                  fontsize=8, color="#555")  # fmt: skip
    for middle, label, limit in zip((1.5, 0.5), ("measured", "predicted"), limits, strict=True):
        axes.text(-1.5, middle * along, f"{label}\n±{limit:.2f}", rotation=90, ha="right",
                  va="center", multialignment="center", fontsize=8.5)  # fmt: skip
    return figure


def _levels(inside: NDArray[np.bool_]) -> list[int]:
    """Axial slices that hold equal parts of the voxels."""
    cumulative = np.cumsum(inside.sum(axis=(0, 1)))
    parts = (np.arange(_SLICES) + 0.5) / _SLICES * cumulative[-1]
    return [int(level) for level in np.searchsorted(cumulative, parts)]


def _profile_figure(
    measured: NDArray[np.floating[Any]], predicted: NDArray[np.floating[Any]]
) -> Figure:
    """Units in the order of their measured responses."""
    figure = Figure(figsize=(5.0, 2.25))
    axes = figure.add_axes((0.12, 0.2, 0.87, 0.66))
    order = np.argsort(measured)
    axes.axhline(0, color="#c9ced4", lw=0.7)
    axes.plot(measured[order], color=GREY, lw=1.6, label="measured")
    size = float(np.clip(600 / len(order), 1.2, 4))
    axes.plot(predicted[order], "o", color=MODEL_COLOURS[0], ms=size, mew=0, label="predicted")
    axes.set_xlabel("units, by their measured response", fontsize=8)
    axes.set_ylabel("z-scored response", fontsize=8)
    axes.tick_params(labelsize=8)
    figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    return figure


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
