"""Scores per image: pattern correlation, its repeats' agreement, identification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chasm.metrics import centred_pattern_correlation, pattern_correlation

FloatArray = NDArray[np.floating[Any]]

PATTERN_KEYS = ("pattern_correlation", "pattern_correlation_centred")
IDENTIFICATION_KEYS = (
    "identification_top1",
    "identification_top5",
    "identification_two_way",
)

_TIE = 1e-10
"""Correlations closer than this count as tied."""


def pattern_scores(
    prediction: FloatArray, target: FloatArray, train_mean: FloatArray
) -> dict[str, FloatArray]:
    """Pattern correlation of every image, plain and centred, each (images,).

    Parameters
    ----------
    prediction, target
        (images, units).
    train_mean
        (units,).
    """
    predicted, true, mean = (
        torch.from_numpy(np.array(values, dtype=np.float64))
        for values in (prediction, target, train_mean)
    )
    return {
        "pattern_correlation": pattern_correlation(predicted, true).numpy(),
        "pattern_correlation_centred": centred_pattern_correlation(predicted, true, mean).numpy(),
    }


def identification_scores(prediction: FloatArray, target: FloatArray) -> dict[str, FloatArray]:
    """Which of the images produced this measured pattern? One score per image.

    Each measured pattern is correlated with the predictions for all images. Ties are ordered
    at random in expectation, so a prediction that ignores the image is at chance.

    Parameters
    ----------
    prediction, target
        (images, units).

    Returns
    -------
    dict
        Keys `IDENTIFICATION_KEYS`, each (images,) in [0, 1]: probability that the image is among
        the first 1 or 5, and that it beats another image; NaN for a constant pattern. The mean
        over images is `chasm.metrics.identification`.
    """
    predicted, true = (_unit_rows(values) for values in (prediction, target))
    defined = np.isfinite(predicted[:, 0]) & np.isfinite(true[:, 0])
    scores = {key: np.full(len(target), np.nan) for key in IDENTIFICATION_KEYS}
    n = int(defined.sum())
    if n < 2:
        return scores
    similarity = true[defined] @ predicted[defined].T
    own = np.diagonal(similarity)[:, None]
    better = (similarity > own + _TIE).sum(axis=1)
    tied = (np.abs(similarity - own) <= _TIE).sum(axis=1) - 1
    for key, k in (("identification_top1", 1), ("identification_top5", 5)):
        scores[key][defined] = np.clip((k - better) / (tied + 1), 0, 1)
    scores["identification_two_way"][defined] = 1 - (better + tied / 2) / (n - 1)
    return scores


def image_reliability(repeat_targets: FloatArray) -> FloatArray:
    """Mean correlation across units over the pairs of repeats of each image.

    Parameters
    ----------
    repeat_targets
        (images, repeats, units); a missing repeat is NaN in all units. A unit that is NaN in a
        repeat that is there is left out everywhere.

    Returns
    -------
    ndarray
        (images,), NaN for images shown once.
    """
    values = np.asarray(repeat_targets)
    present: NDArray[np.bool_] = np.asarray(np.isfinite(values).any(axis=2))
    units = np.isfinite(values[present]).all(axis=0)
    return np.array(
        [
            _mean_pair(_unit_rows(trials[there][:, units]))
            for trials, there in zip(values, present, strict=True)
        ]
    )


def pattern_ceiling(reliability: FloatArray, repeats: NDArray[np.int64]) -> FloatArray:
    """Best reachable pattern correlation, from the reliability of one trial's pattern.

    A mean over k repeats has the reliability k rho / (1 + (k - 1) rho) (Spearman-Brown); the
    square root is its correlation with the noise-free pattern, averaged over the images' k.

    Parameters
    ----------
    reliability
        (samples,), mean over images of `image_reliability`.
    repeats
        (images,), trials averaged.

    Returns
    -------
    ndarray
        (samples,); for the data as they are it is `chasm.noise_ceiling.pattern_ceiling`.
    """
    rho = np.maximum(reliability, 0.0)
    levels, images = np.unique(repeats, return_counts=True)
    total = np.zeros_like(rho)
    for k, count in zip(levels, images, strict=True):
        total += count * np.sqrt(k * rho / (1 + (k - 1) * rho))
    return total / images.sum()


def _mean_pair(patterns: FloatArray) -> float:
    """Mean of the off-diagonal of the correlation matrix of (repeats, units) unit rows."""
    k = len(patterns)
    if k < 2:
        return float("nan")
    return float((np.square(patterns.sum(axis=0)).sum() - k) / (k * (k - 1)))


def _unit_rows(values: FloatArray) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    constant = values.max(axis=1) == values.min(axis=1)
    centred = values - values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    norm[constant] = np.nan
    return centred / norm
