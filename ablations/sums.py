"""R² summed over weighted sets of units, under every condition, in every resample of the images.

With y and p the response and the prediction less the train mean, an image adds p (2y − p) to the
squared error that a unit's prediction saves, and y² to the squared error of the train mean; R² is
the ratio of the two sums. In every resample both are matrix products (resamples, images) @
(images, units), taken a block of units at a time, so memory does not grow with the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chasm.progress import track

FloatArray = NDArray[np.floating[Any]]
Gain = Callable[[slice, FloatArray], tuple[FloatArray, FloatArray]]
"""From units and their centred responses (images, units) to the squared error saved by every
image (images, units), and a constant (units,) that is taken off its sum over images."""
K = TypeVar("K")

_BLOCK_VALUES = 2**21
"""Values, resamples × units, of one block."""


@dataclass(frozen=True)
class ColumnScores:
    """One condition's scores in weighted sets of units.

    Attributes
    ----------
    values
        (1 + resamples, columns), first on the images as they are; NaN where a set has no unit
        with a score.
    terms
        (images, columns), what each image adds to ``values[0]``.
    unit_r2
        (units,), NaN where the responses do not differ from the train mean.
    """

    values: FloatArray
    terms: FloatArray
    unit_r2: FloatArray


def gain_of_prediction(prediction: FloatArray, train_mean: FloatArray) -> Gain:
    """Squared error that a prediction (images, units) saves against the train mean (units,)."""

    def gain(units: slice, response: FloatArray) -> tuple[FloatArray, FloatArray]:
        predicted = np.asarray(prediction[:, units], np.float64) - train_mean[units]
        return predicted * (2 * response - predicted), np.zeros(response.shape[1])

    return gain


def gain_of_interchange(
    predictions: FloatArray, donor: NDArray[np.int64], train_mean: FloatArray
) -> Gain:
    """Squared error saved for the image of the patches rather than for the image of the CLS token.

    Over pairs (i, j) the score is half of the R² of f(CLS_i, patches_j) against y_j less that
    against y_i, times (n − 1) / n. Without the factor an additive encoder would score too high,
    because no image is paired with itself; with it, and all n − 1 donors, the score of an
    additive encoder on its own output equals its specialisation, and for an additive encoder
    that is calibrated it does in expectation. In a resample a pair weighs c_i + c_j − 1, the
    first order of c_i c_j, with c the counts: exact for the linear part of the statistic, and
    as cheap as a prediction's.

    Parameters
    ----------
    predictions
        (donors, images, units).
    donor
        (donors, images), the image i of every j; each row a derangement.
    train_mean
        (units,).
    """
    n_donors, n_images = donor.shape
    factor = (n_images - 1) / (n_images * n_donors)

    def gain(units: slice, response: FloatArray) -> tuple[FloatArray, FloatArray]:
        patches = np.zeros_like(response)
        cls = np.zeros_like(response)
        for prediction, images in zip(predictions, donor, strict=True):
            predicted = np.asarray(prediction[:, units], np.float64) - train_mean[units]
            other = response[images]
            saved = (response - other) * (predicted - (response + other) / 2)
            patches += saved
            cls[images] += saved
        return factor * (patches + cls), factor * patches.sum(axis=0)

    return gain


def score_columns(
    gains: Mapping[K, Gain],
    response: FloatArray,
    counts: FloatArray,
    weights: FloatArray,
    worth: FloatArray,
) -> dict[K, ColumnScores]:
    """Score every condition in every column: Σ weights × R² / Σ worth over units.

    A unit whose responses do not vary about the train mean in a resample is left out there, of
    both sums.

    Parameters
    ----------
    gains
        Condition to the squared error it saves.
    response
        (images, units) less the train mean.
    counts
        (1 + resamples, images), the first row all ones.
    weights, worth
        (units, columns).
    """
    n_images, n_units = response.shape
    shape = (len(counts), weights.shape[1])
    divisor = np.zeros(shape)
    scores = {
        key: ColumnScores(np.zeros(shape), np.zeros((n_images, shape[1])), np.empty(n_units))
        for key in gains
    }
    for units in _blocks(n_units, _BLOCK_VALUES // len(counts) + 1):
        block = np.asarray(response[:, units], np.float64)
        total = counts @ np.square(block)
        scored = total > 0
        inverse = np.divide(1, total, out=np.zeros_like(total), where=scored)
        all_scored = scored.all()
        divisor += worth[units].sum(axis=0) if all_scored else scored @ worth[units]
        for key, gain in gains.items():
            saved, constant = gain(units, block)
            r2 = (counts @ saved - constant) * inverse
            terms = (saved - constant / n_images) * inverse[0]
            scores[key].values[...] += r2 @ weights[units]
            scores[key].terms[...] += terms @ weights[units]
            scores[key].unit_r2[units] = np.where(scored[0], r2[0], np.nan)
    divisor[divisor <= 0] = np.nan
    for one in scores.values():
        one.values[...] /= divisor
        one.terms[...] /= divisor[0]
    return scores


def _blocks(n_units: int, size: int) -> Iterable[slice]:
    blocks = [slice(start, start + size) for start in range(0, n_units, size)]
    return blocks if len(blocks) == 1 else track(blocks, "effects, blocks of units")
