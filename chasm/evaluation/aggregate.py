"""From scores per unit and per image to scores per region, for the data and its resamples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chasm import metrics
from chasm.evaluation.bootstrap import TargetSums, UnitScores, image_means, unit_scores
from chasm.evaluation.catalogue import METRICS
from chasm.evaluation.patterns import (
    IDENTIFICATION_KEYS,
    PATTERN_KEYS,
    identification_scores,
    pattern_scores,
)
from chasm.evaluation.regions import (
    MIN_PATTERN_UNITS,
    Region,
    sums_over_units,
    weight_matrix,
    weighted_mean,
    weighted_median,
)
from chasm.noise_ceiling import averaged_pattern_ceiling, image_reliability
from chasm.progress import track

FloatArray = NDArray[np.floating[Any]]

RegionTable = dict[str, FloatArray]
"""Metric to (samples, regions)."""

_BLOCK = 100
"""Resamples at a time."""


@dataclass(frozen=True)
class ScoredTarget:
    """A target with everything that scoring against it needs.

    Attributes
    ----------
    name
        Name of the target.
    values
        (images, units).
    train_mean
        (units,), reference of R².
    ceiling
        (units,), noise ceiling in r² units of the mean over repeats; NaN where unknown.
    repeats
        (images,), trials averaged.
    repeat_targets
        (images, repeats, units) or None.
    regions
        Where to score.
    nc_threshold
        Units at or below it are left out of noise-normalised scores.
    """

    name: str
    values: FloatArray
    train_mean: FloatArray
    ceiling: FloatArray
    repeats: NDArray[np.int64]
    repeat_targets: FloatArray | None
    regions: tuple[Region, ...]
    nc_threshold: float


def unit_scores_of(prediction: FloatArray, target: ScoredTarget) -> UnitScores:
    """Score every unit on the images as they are, each field (1, units)."""
    predicted, true, mean = (
        torch.from_numpy(np.array(values, dtype=np.float64))
        for values in (prediction, target.values, target.train_mean)
    )
    return UnitScores(
        metrics.voxelwise_correlation(predicted, true).numpy()[None],
        metrics.r2(predicted, true, mean).numpy()[None],
        (predicted - true).square().mean(dim=0).numpy()[None],
    )


def image_scores_of(prediction: FloatArray, target: ScoredTarget) -> RegionTable:
    """Score every image, each metric (images, regions).

    Pattern correlations are computed for all units and for each group with enough units,
    identification for all units; elsewhere the scores are NaN.
    """
    shape = (len(target.values), len(target.regions))
    table = {key: np.full(shape, np.nan) for key in (*PATTERN_KEYS, *IDENTIFICATION_KEYS)}
    for index, region in enumerate(target.regions):
        if not has_patterns(region):
            continue
        members = region.members
        scores = pattern_scores(
            prediction[:, members], target.values[:, members], target.train_mean[members]
        )
        if region.level == "all":
            scores |= identification_scores(prediction, target.values)
        for key, values in scores.items():
            table[key][:, index] = values
    return table


def has_patterns(region: Region) -> bool:
    """Whether pattern correlations are computed in a region."""
    if region.level == "all":
        return True
    return region.level == "group" and len(region.members) >= MIN_PATTERN_UNITS


def unit_table(scores: UnitScores, target: ScoredTarget) -> RegionTable:
    """Scores per region from scores per unit, each (samples, regions)."""
    weights = weight_matrix(target.regions)
    r = scores.correlation
    return {
        "voxelwise_correlation_mean": weighted_mean(r, weights),
        "voxelwise_correlation_median": _medians(r, target.regions),
        "r2": weighted_mean(scores.r2, weights),
        "noise_normalised_r2": _noise_normalised(scores.r2, target, weights),
        "noise_normalised_signed_r2": _noise_normalised(np.sign(r) * r**2, target, weights),
        "mse": weighted_mean(scores.squared_error, weights),
    }


def _medians(values: FloatArray, regions: tuple[Region, ...]) -> FloatArray:
    return np.stack([weighted_median(values, region.weights) for region in regions], axis=1)


def _noise_normalised(values: FloatArray, target: ScoredTarget, weights: FloatArray) -> FloatArray:
    """Sum of scores over sum of ceilings, over the units that have both."""
    chosen = np.flatnonzero(target.ceiling > target.nc_threshold)
    summed, ceiling = sums_over_units(values[:, chosen], weights[chosen], target.ceiling[chosen])
    return np.divide(summed, ceiling, out=np.full_like(summed, np.nan), where=ceiling > 0)


def point_table(units: UnitScores, images: RegionTable, target: ScoredTarget) -> RegionTable:
    """Every metric on the images as they are, each (1, regions)."""
    once = np.ones((1, len(target.values)))
    table = unit_table(units, target)
    return table | {key: image_means(values, once) for key, values in images.items()}


def bootstrap_tables(
    predictions: Mapping[str, FloatArray],
    images: Mapping[str, RegionTable],
    target: ScoredTarget,
    counts: FloatArray,
) -> dict[str, RegionTable]:
    """Every metric of every row on the same resamples, each (resamples, regions).

    Parameters
    ----------
    predictions
        Row to (images, units).
    images
        Row to its scores per image, see `image_scores_of`.
    target
        What is scored against.
    counts
        (resamples, images), see `chasm.evaluation.bootstrap.resample_counts`.
    """
    tables = {
        name: {key: np.full((len(counts), len(target.regions)), np.nan) for key in METRICS}
        for name in predictions
    }
    sums = TargetSums(target.values, target.train_mean)
    starts = range(0, len(counts), _BLOCK)
    for start in track(starts, f"bootstrap ({target.name})", len(starts)):
        block = slice(start, start + _BLOCK)
        target_block = sums.block(counts[block])
        for name, prediction in predictions.items():
            scores = unit_scores(prediction, sums, counts[block], target_block)
            for key, values in unit_table(scores, target).items():
                tables[name][key][block] = values
    for name, scores_of in images.items():
        for key, values in scores_of.items():
            tables[name][key] = image_means(values, counts)
    return tables


def ceiling_tables(target: ScoredTarget, counts: FloatArray) -> tuple[RegionTable, RegionTable]:
    """Scores of the best possible prediction, and their resamples.

    The ceilings per unit come from the ncsnr and do not depend on which test images are drawn;
    the pattern ceiling comes from the repeats of the test images and does. The smallest squared
    error is the noise left in the target: its variance x (1 - noise ceiling), for each unit.
    """
    weights = weight_matrix(target.regions)
    n_regions = len(target.regions)
    point = {key: np.full((1, n_regions), np.nan) for key in METRICS}
    samples = {key: np.full((len(counts), n_regions), np.nan) for key in METRICS}
    ceiling = target.ceiling[None]
    root = np.sqrt(ceiling)
    point["voxelwise_correlation_mean"] = weighted_mean(root, weights)
    point["voxelwise_correlation_median"] = _medians(root, target.regions)
    point["r2"] = weighted_mean(ceiling, weights)
    variance = np.var(np.asarray(target.values, dtype=np.float64), axis=0)
    point["mse"] = weighted_mean(variance * (1 - ceiling), weights)
    known = np.isfinite(point["r2"]) & (point["r2"] > 0)
    for key in ("noise_normalised_r2", "noise_normalised_signed_r2"):
        point[key] = np.where(known, 1.0, np.nan)
    if target.repeat_targets is None:
        return point, samples
    once = np.ones((1, len(target.values)))
    for index, region in enumerate(target.regions):
        if not has_patterns(region):
            continue
        reliability = image_reliability(target.repeat_targets[:, :, region.members])
        for table, drawn in ((point, once), (samples, counts)):
            mean = image_means(reliability, drawn)
            table["pattern_correlation"][:, index] = averaged_pattern_ceiling(mean, target.repeats)
    return point, samples
