"""Paired bootstrap over images: the same resamples for every row, ROI and unit.

The scores of a resample follow from sums over images in which each image counts as often as it
was drawn. For all resamples at once these sums are matrix products (resamples, images) @
(images, units), so nothing is ever gathered; the memory is one block of resamples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chasm.errors import ConfigError

FloatArray = NDArray[np.floating[Any]]

MIN_RESAMPLES = 100
"""Fewest resamples that 95 % intervals are read from."""

_DUST = 1e-12
"""Variance, relative to the second moment, below which a resampled unit is constant."""


class UnitScores(NamedTuple):
    """Scores of every unit in every resample, each (resamples, units) float64."""

    correlation: FloatArray
    r2: FloatArray
    squared_error: FloatArray


def check_resamples(n_boot: int) -> None:
    """Refuse a number of resamples that gives no usable interval.

    Raises
    ------
    ConfigError
        If it is negative, or above 0 and below `MIN_RESAMPLES`.
    """
    if n_boot < 0 or 0 < n_boot < MIN_RESAMPLES:
        raise ConfigError(
            "--n-boot",
            f"{n_boot} resamples",
            f"Use 0 for no intervals or at least {MIN_RESAMPLES}.",
        )


def resample_counts(n_images: int, n_boot: int, seed: int) -> NDArray[np.float64]:
    """How often each image is drawn, (resamples, images); every row sums to `n_images`."""
    rng = np.random.default_rng(seed)
    probability = np.full(n_images, 1 / n_images)
    return rng.multinomial(n_images, probability, size=n_boot).astype(np.float64)


class TargetSums:
    """Sums over images of a target that every row of predictions shares.

    Parameters
    ----------
    target
        (images, units).
    train_mean
        (units,), the prediction whose R² is 0.
    """

    def __init__(self, target: FloatArray, train_mean: FloatArray) -> None:
        self.reference = np.asarray(train_mean, dtype=np.float64)
        # Sums of squares about the train mean; centring keeps them free of cancellation.
        self.values = np.asarray(target, dtype=np.float64) - self.reference
        self.squares = np.square(self.values)

    def block(self, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Sum and sum of squares, each (resamples, units)."""
        return counts @ self.values, counts @ self.squares


def unit_scores(
    prediction: FloatArray,
    target: TargetSums,
    counts: FloatArray,
    target_block: tuple[FloatArray, FloatArray] | None = None,
) -> UnitScores:
    """Score every unit in every resample.

    Parameters
    ----------
    prediction
        (images, units).
    target
        The target's sums.
    counts
        (resamples, images), see `resample_counts`.
    target_block
        ``target.block(counts)`` when it is already known.

    Returns
    -------
    UnitScores
        Pearson r (NaN where a resample is constant), R² with the train mean as reference, and
        the mean squared error.
    """
    total, total_squares = target_block or target.block(counts)
    n = counts.sum(axis=1, keepdims=True)
    predicted = np.asarray(prediction, dtype=np.float64) - target.reference
    predicted_sum = counts @ predicted
    predicted_squares = counts @ np.square(predicted)
    products = counts @ (predicted * target.values)
    error = np.maximum(total_squares - 2 * products + predicted_squares, 0)
    covariance = products - predicted_sum * total / n
    spread = predicted_squares - np.square(predicted_sum) / n
    target_spread = total_squares - np.square(total) / n
    varies = (spread > _DUST * predicted_squares) & (target_spread > _DUST * total_squares)
    scale = np.sqrt(np.where(varies, spread * target_spread, np.nan))
    correlation = np.clip(covariance / scale, -1, 1)
    r2 = 1 - error / np.where(total_squares > 0, total_squares, np.nan)
    return UnitScores(correlation, r2, error / n)


def image_means(values: FloatArray, counts: FloatArray) -> FloatArray:
    """Mean over the resampled images of a score per image, NaN images left out.

    Parameters
    ----------
    values
        (images,) or (images, scores).
    counts
        (resamples, images).

    Returns
    -------
    ndarray
        (resamples,) or (resamples, scores).
    """
    valid = np.isfinite(values)
    total = counts @ valid.astype(np.float64)
    summed = counts @ np.where(valid, values, 0.0)
    return np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0)


def interval(samples: FloatArray, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Percentile interval over the first axis; NaN where a resample, or all, have no value."""
    if len(samples) == 0:
        nothing = np.full(samples.shape[1:], np.nan)
        return nothing, nothing
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high
