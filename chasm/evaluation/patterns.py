"""Scores per image: pattern correlation and identification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chasm.metrics import (
    centred_pattern_correlation,
    image_identification,
    pattern_correlation,
)

FloatArray = NDArray[np.floating[Any]]

PATTERN_KEYS = ("pattern_correlation", "pattern_correlation_centred")
IDENTIFICATION_KEYS = (
    "identification_top1",
    "identification_top5",
    "identification_two_way",
)


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

    Parameters
    ----------
    prediction, target
        (images, units).

    Returns
    -------
    dict
        Keys `IDENTIFICATION_KEYS`, each (images,); see `chasm.metrics.image_identification`.
    """
    predicted, true = (
        torch.from_numpy(np.array(values, dtype=np.float64)) for values in (prediction, target)
    )
    scores = image_identification(predicted, true)
    return {f"identification_{name}": values.numpy() for name, values in scores.items()}
