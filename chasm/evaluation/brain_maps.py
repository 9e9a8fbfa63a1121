"""Brain maps in the subject's own volume: static slices, and a page to click through."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chasm.errors import DataError
from chasm.evaluation.figures import STYLE

Volume = Callable[[NDArray[np.floating[Any]]], Any]
"""Puts one value per unit into the subject's volume: (units,) -> NIfTI image, NaN outside."""

_SLICES = 140
"""About how many slices the viewer has along the longest axis."""

_LINK = re.compile(r"<link\b[^>]*>", re.IGNORECASE)
_VIEWER = re.compile(r"brainsprite\((\{.*?\})\);", re.DOTALL)
_REQUEST = re.compile(r"""(?:src|href|url)\s*[=(:]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)
_STYLE_SHEET = (
    "<style>body { margin: 0; overflow: hidden; } canvas { cursor: crosshair; }"
    " div:has(> input.slider) { display: none !important; }</style>"
)


def brain_figure(
    values: NDArray[np.floating[Any]],
    volume: Volume,
    title: str,
    *,
    background: Any = None,
    limits: tuple[float, float] | None = None,
    colours: str = "viridis",
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
    limits
        Ends of the colour scale; default: from 0 to the 99th percentile of the magnitude.
    colours
        Name of a matplotlib colour map.
    """
    from nilearn.plotting import find_cut_slices, plot_stat_map

    image = cropped(volume(values))
    low, high = colour_limits(image) if limits is None else limits
    shown, cover = visible(image, low, high)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 2.1))
        display = plot_stat_map(
            shown,
            bg_img=background,
            figure=figure,
            axes=(0.0, 0.0, 0.91, 1.0),
            display_mode="z",
            cut_coords=find_cut_slices(cover, direction="z", n_cuts=6),
            cmap=mpl.colormaps[colours],
            vmin=low,
            vmax=high,
            threshold=1e-8 * high,
            black_bg=False,
            draw_cross=False,
            annotate=False,
            colorbar=False,
        )
        display.annotate(size=8)
        display.add_contours(cover, levels=[0.5], colors=["#777"], linewidths=0.4)
        for cut in display.axes.values():  # nilearn lets neighbours touch
            cut.ax.margins(0)
            (left, right), (bottom, top) = cut.ax.get_xlim(), cut.ax.get_ylim()
            cut.ax.set_xlim(left - 0.1 * (right - left), right + 0.1 * (right - left))
            cut.ax.set_ylim(bottom - 0.16 * (top - bottom), top + 0.16 * (top - bottom))
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(low, high), mpl.colormaps[colours])
        bar = figure.colorbar(scale, cax=figure.add_axes((0.925, 0.14, 0.012, 0.72)))
        bar.set_label(title, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    return figure


def colour_limits(image: Any, *, symmetric: bool = False) -> tuple[float, float]:
    """Give a scale from 0, or minus the other end, to the 99th percentile of the magnitude."""
    limit = float(np.nanpercentile(np.abs(np.asarray(image.dataobj, np.float64)), 99)) or 1.0
    return (-limit if symmetric else 0.0, limit)


def visible(image: Any, low: float, high: float) -> tuple[Any, Any]:
    """Prepare a map for nilearn, which hides what is 0 or below the scale.

    Values outside the scale take the value of its end; 0 becomes a trace of `high`.

    Returns
    -------
    map, cover
        NIfTI images; the second is 1 where there is a value, else 0.
    """
    data = np.asarray(image.dataobj, dtype=np.float64)
    inside = np.isfinite(data)
    within = np.clip(data, low, high)
    shown = np.where(inside, np.where(within == 0, 1e-6 * high, within), 0.0)
    kind = type(image)
    return kind(shown.astype(np.float32), image.affine), kind(
        inside.astype(np.float32), image.affine
    )


def cropped(image: Any, margin: int = 8) -> Any:
    """Cut a NIfTI image to the box around its finite voxels, with a margin of NaN or more."""
    data = np.asarray(image.dataobj)
    where = np.argwhere(np.isfinite(data))
    first = where.min(axis=0) - margin
    last = where.max(axis=0) + margin + 1
    room = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(first, last, data.shape, strict=True)]
    padded = np.pad(data, room, constant_values=np.nan)
    start = np.maximum(first, 0)
    box = tuple(slice(a, a + n) for a, n in zip(start, last - first, strict=True))
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return type(image)(padded[box], affine)


@dataclass(frozen=True)
class InteractiveMap:
    """A map to click through.

    Attributes
    ----------
    title
        What is shown.
    page
        A whole HTML document.
    ratio
        Its width over its height.
    """

    title: str
    page: str
    ratio: float


def interactive_map(
    values: NDArray[np.floating[Any]],
    volume: Volume,
    title: str,
    *,
    background: Any = None,
    limits: tuple[float, float] | None = None,
    colours: str = "viridis",
) -> InteractiveMap:
    """Make a page with three slices through a map; a click moves them and shows the value.

    nilearn's viewer, with everything it needs inside: the page asks the network for nothing.

    Parameters
    ----------
    values, volume, title, background, limits, colours
        As for `brain_figure`.

    Raises
    ------
    DataError
        If the viewer of this nilearn would load anything from elsewhere.
    """
    from nilearn.plotting import view_img

    image = cropped(volume(values), margin=3)
    low, high = colour_limits(image) if limits is None else limits
    shown = _finer(visible(image, low, high)[0])
    strongest = np.unravel_index(np.argmax(np.abs(shown.dataobj)), shown.shape)
    with warnings.catch_warnings():
        # nilearn: the map is not in its template's space; it need not be.
        warnings.simplefilter("ignore")
        view = view_img(
            shown,
            bg_img=False if background is None else background,
            cut_coords=tuple((shown.affine @ [*strongest, 1])[:3]),
            threshold=1e-8 * high,
            black_bg=False,
            cmap=mpl.colormaps[colours],
            symmetric_cmap=low < 0,
            vmin=low,
            vmax=high,
            resampling_interpolation="nearest",
        )
    page = _LINK.sub("", str(view.html)).replace("</head>", _STYLE_SHEET + "</head>", 1)
    page = _VIEWER.sub(_restyled, page, count=1)
    asked = _REQUEST.search(page)
    if asked is not None:
        raise DataError(
            "nilearn.plotting.view_img",
            f"its page would load from elsewhere ({page[asked.start() : asked.end() + 40]!r})",
            "Use nilearn 0.12 to 0.14.",
        )
    x, y, z = shown.shape
    return InteractiveMap(title, page, (2 * x + y) / (1.15 * max(y, z)))


def _restyled(found: re.Match[str]) -> str:
    """Let the viewer write the value under a thin grey cross."""
    options = json.loads(found[1]) | {"flagValue": True, "colorCrosshair": "#8a9099"}
    return f"brainsprite({json.dumps(options)});"


def _finer(image: Any) -> Any:
    """Repeat voxels so that the viewer's cross, one voxel wide, is thin; leave room for its scale.

    The values stay as they are, and so do their places.
    """
    data = np.asarray(image.dataobj)
    factor = max(1, round(_SLICES / max(data.shape)))
    for axis in range(3):
        data = data.repeat(factor, axis)
    room = [(0, 0), (0, 0), (0, max(1, data.shape[2] // 5))]
    affine = image.affine.copy()
    affine[:3, :3] /= factor
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, (factor - 1) / 2)
    return type(image)(np.pad(data, room), affine)
