"""What draws are worth: their spread against that of repeats, and how many repeats they cover.

For unit v and image i, a model that can draw gives n predictions with mean m and unbiased
variance s²; the image was shown k times, with responses y. Per unit

    draws' variance    mean over images of s²
    repeats' variance  pooled over images: Σ_i Σ_r (y_ir − mean_r y_ir)² / Σ_i (k_i − 1)
    noise variance     1 / (1 + ncsnr²), because single z-scored responses have variance 1

and the coverage is the share of all held repeats with |y − m| ≤ t · s · √(1 + 1/n), where t is
the 97.5 % point of Student's t with n − 1 degrees of freedom: the interval that holds 95 % of
further draws. Repeats that were distributed as the draws would be covered 95 % of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from chasm.evaluation.bootstrap import interval
from chasm.evaluation.grids import Cell, Grid, Line, make_cell
from chasm.evaluation.prediction_parts import Draws
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.regions import Region, weight_matrix, weighted_mean

FloatArray = NDArray[np.floating[Any]]

LEVEL = 0.95
"""Share of further draws that the interval of an image holds."""

COLLAPSED = 1e-3
"""Ratio of draws to repeats below which the page says that draws hardly differ."""

NO_USE = "Draws of an image hardly differ: the decoder makes no use of its latent."

_BLOCK = 64
"""Images at a time."""

MEANING = (
    "A draw varies with the model's latent only: it shows what the model leaves open about the "
    "response to an image, not the noise of a measurement. Draws/repeats would be 1, and the "
    "coverage 0.95, if single presentations were distributed as the draws are."
)


class _Sums(NamedTuple):
    """Sums over the units of each region, per image; they are what the bootstrap resamples."""

    drawn: FloatArray
    """(images, regions), variance over draws."""
    within: FloatArray
    """(images, regions), squared distances of the repeats from their mean."""
    freedom: FloatArray
    """(images,), repeats minus 1."""
    covered: FloatArray
    """(images, regions), repeats inside the draws' interval."""
    repeats: FloatArray
    """(images,), repeats that are held."""


def compare_spreads(
    file: PredictionFile, regions: Sequence[Region], counts: FloatArray
) -> pd.DataFrame | None:
    """Compare draws with repeats in every region.

    Parameters
    ----------
    file
        With draws and with the targets of single repeats.
    regions
        Where to compare.
    counts
        (resamples, images), see `chasm.evaluation.bootstrap.resample_counts`.

    Returns
    -------
    DataFrame or None
        One line per region: level, atlas, region, n_units, n_voxels, draw_variance,
        repeat_variance, noise_variance (weighted means over the region's units), ratio (draws
        over repeats), noise_ratio (draws over noise), coverage; ratio and coverage with _low
        and _high (95 % percentile interval over images). NaN where an image is never repeated,
        or no ncsnr is known. None without draws or repeats.
    """
    if file.draws is None or file.repeat_targets is None:
        return None
    weights = weight_matrix(regions)
    sums = _sums_of(file.draws, file.repeat_targets, weights)
    total = weights.sum(axis=0)
    point = _statistics(sums, np.ones((1, file.n_images)), total)
    samples = _statistics(sums, counts, total)
    noise = noise_variance(file)
    drawn = np.where(np.isfinite(noise), np.mean(file.draws.variance, axis=0, dtype=float), np.nan)
    columns: dict[str, Any] = {
        "level": [region.level for region in regions],
        "atlas": [region.atlas for region in regions],
        "region": [region.name for region in regions],
        "n_units": [region.n_units for region in regions],
        "n_voxels": [region.n_voxels for region in regions],
        "draw_variance": point["draw_variance"][0],
        "repeat_variance": point["repeat_variance"][0],
        "noise_variance": weighted_mean(noise[None], weights)[0],
    }
    columns["noise_ratio"] = weighted_mean(drawn[None], weights)[0] / columns["noise_variance"]
    for name in ("ratio", "coverage"):
        columns[name] = point[name][0]
        columns[f"{name}_low"], columns[f"{name}_high"] = interval(samples[name])
    return pd.DataFrame(columns)


def interval_factor(n: int) -> float:
    """Half width, in standard deviations of n draws, of the interval of a further draw."""
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt(1 + 1 / n))


def noise_variance(file: PredictionFile) -> FloatArray:
    """Noise variance of single z-scored responses, (units,); NaN where no ncsnr is known.

    Parcel means of z-scored voxels do not have variance 1, so that theirs is not known either.
    """
    if file.info.unit == "parcel":
        return np.full(file.n_units, np.nan)
    return 1 / (1 + np.square(np.asarray(file.units.ncsnr, dtype=np.float64)))


def unit_variances(file: PredictionFile) -> tuple[FloatArray, FloatArray]:
    """Draws' and repeats' variance of every unit, each (units,)."""
    assert file.draws is not None
    assert file.repeat_targets is not None
    within, freedom = np.zeros(file.n_units), 0.0
    for _, present, deviations in _repeat_blocks(file.repeat_targets):
        within += np.square(deviations).sum(axis=(0, 1))
        freedom += float(np.maximum(present.sum(axis=1) - 1, 0).sum())
    drawn: FloatArray = np.mean(file.draws.variance, axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return drawn, within / np.float64(freedom)


def _repeat_blocks(
    repeats: FloatArray,
) -> Iterator[tuple[slice, NDArray[np.bool_], FloatArray]]:
    """Yield (slice, present (images, repeats), deviations from the image's mean, 0 if absent)."""
    for start in range(0, len(repeats), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = np.asarray(repeats[rows], dtype=np.float64)
        present = np.asarray(np.isfinite(block).all(axis=2))
        known = np.where(present[:, :, None], block, 0.0)
        mean = known.sum(axis=1) / np.maximum(present.sum(axis=1), 1)[:, None]
        yield rows, present, np.where(present[:, :, None], block - mean[:, None], 0.0)


def _sums_of(draws: Draws, repeats: FloatArray, weights: FloatArray) -> _Sums:
    shape = (len(repeats), weights.shape[1])
    within, covered = np.zeros(shape), np.zeros(shape)
    held = np.zeros(len(repeats))
    for rows, present, deviations in _repeat_blocks(repeats):
        reach = interval_factor(draws.n) * np.sqrt(np.asarray(draws.variance[rows], np.float64))
        distance = np.abs(repeats[rows] - np.asarray(draws.mean[rows], np.float64)[:, None])
        inside = (distance <= reach[:, None]) & present[:, :, None]
        within[rows] = np.square(deviations).sum(axis=1) @ weights
        covered[rows] = inside.sum(axis=1).astype(np.float64) @ weights
        held[rows] = present.sum(axis=1)
    drawn = np.asarray(draws.variance, dtype=np.float64) @ weights
    return _Sums(drawn, within, np.maximum(held - 1, 0), covered, held)


def _statistics(sums: _Sums, counts: FloatArray, total: FloatArray) -> dict[str, FloatArray]:
    """Variances, ratio and coverage of resamples, each (resamples, regions)."""
    drawn = (counts @ sums.drawn) / counts.sum(axis=1, keepdims=True) / total
    freedom, held = ((counts @ values)[:, None] for values in (sums.freedom, sums.repeats))
    with np.errstate(divide="ignore", invalid="ignore"):
        repeated = (counts @ sums.within) / freedom / total
        return {
            "draw_variance": drawn,
            "repeat_variance": repeated,
            "ratio": drawn / repeated,
            "coverage": (counts @ sums.covered) / held / total,
        }


def sampling_grid(frame: pd.DataFrame, draws: Draws, unit: str) -> Grid:
    """Show all units and the groups, or every ROI where there is no group."""
    groups = frame[frame["level"].isin(["all", "group"])]
    shown = groups if len(groups) > 1 else frame
    lines = []
    for _, line in shown.iterrows():
        variances = (line[f"{name}_variance"] for name in ("draw", "repeat", "noise"))
        lines.append(
            Line(
                str(line["region"]),
                "",
                (
                    *("–" if np.isnan(value) else f"{value:.3g}" for value in variances),
                    _small(line["ratio"], line["ratio_low"], line["ratio_high"]),
                    _small(line["noise_ratio"]),
                    make_cell(line["coverage"], line["coverage_low"], line["coverage_high"]),
                ),
            )
        )
    return Grid(
        f"Spread of {draws.n} draws per image and of repeated presentations",
        (
            "Variance of draws",
            "Variance of repeats",
            "Noise variance (ncsnr)",
            "Draws / repeats",
            "Draws / noise",
            "Repeats inside the draws' 95 %",
        ),
        tuple(lines),
        f"{finding(frame)} {MEANING} Variances are means over {unit}s and test images.",
    )


def _small(value: float, low: float = np.nan, high: float = np.nan) -> Cell | str:
    """Make a cell, or a text with an exponent where three decimals would show nothing."""
    return f"{value:.1e}" if 0 < value < 0.001 else make_cell(value, low, high)


def finding(frame: pd.DataFrame) -> str:
    """Say over all units how much less, or more, draws spread than repeats, and the coverage."""
    line = frame.iloc[0]
    parts = []
    if np.isfinite(line["ratio"]):
        parts.append(f"the variance of draws is {100 * line['ratio']:.3g} % of that of repeats")
    if np.isfinite(line["coverage"]):
        parts.append(
            f"{100 * line['coverage']:.1f} % of the single presentations lie where "
            f"{100 * LEVEL:.0f} % of draws do"
        )
    if not parts:
        return ""
    text = ", and ".join(parts)
    collapsed = line["ratio"] < COLLAPSED
    return f"{text[0].upper()}{text[1:]}." + (f" {NO_USE}" if collapsed else "")
