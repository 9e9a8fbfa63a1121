"""Sign-flip permutation of per-image contrasts, and control of the false discovery rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

FloatArray = NDArray[np.floating[Any]]

FAMILY = ["encoder", "seed", "quantity", "gate", "scale"]
"""Rows that agree in these are one family of tests: its members are ROI × subject."""

_COLUMNS = 256
"""Contrasts at a time."""


def sign_flips(n_images: int, permutations: int, seed: int) -> FloatArray:
    """Signs of every image in every permutation, (permutations, images).

    All 2^n patterns where they are no more than `permutations`, otherwise random ones after a
    first row of ones, the data as they are.
    """
    if n_images < 63 and 2**n_images <= permutations:
        bits = np.arange(2**n_images)[:, None] >> np.arange(n_images) & 1
        return 1.0 - 2.0 * bits
    if permutations <= 0:
        return np.empty((0, n_images))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations + 1, n_images))
    signs[0] = 1
    return signs


def sign_flip_p(contrasts: FloatArray, signs: FloatArray) -> FloatArray:
    """Two-sided p of the sum of per-image contrasts under random signs.

    The test of ``scipy.stats.permutation_test(..., permutation_type="samples")``, with the
    same signs for all contrasts at once: as matrix products it takes a hundredth of the time.

    Parameters
    ----------
    contrasts
        (images, tests).
    signs
        (permutations, images), see `sign_flips`, the data as they are among them.

    Returns
    -------
    ndarray
        (tests,), NaN without permutations and for contrasts that are not finite.
    """
    p = np.full(contrasts.shape[1], np.nan)
    if not len(signs):
        return p
    for start in range(0, contrasts.shape[1], _COLUMNS):
        part = contrasts[:, start : start + _COLUMNS]
        observed = np.abs(part.sum(axis=0))
        # Sums that are equal on paper differ by rounding.
        reached = np.abs(signs @ part) >= observed * (1 - 1e-12)
        p[start : start + _COLUMNS] = reached.mean(axis=0)
    return np.where(np.isfinite(contrasts).all(axis=0), p, np.nan)


def adjust(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the frames of several subjects and give every ROI a q by Benjamini–Hochberg.

    Parameters
    ----------
    frames
        `ablations.effects.Effects.frame` of every subject.

    Returns
    -------
    DataFrame
        All rows, column q recomputed: in each family (`FAMILY`) over ROI × subject; NaN
        where there is no p, and for rows of groups and sets.
    """
    joined = pd.concat(frames, ignore_index=True)
    tested = joined[(joined["level"] == "roi") & joined["p"].notna()]
    joined["q"] = np.nan
    for rows in tested.groupby(FAMILY, sort=False).indices.values():
        index = tested.index[rows]
        joined.loc[index, "q"] = false_discovery_control(tested.loc[index, "p"].to_numpy())
    return joined
