"""Weights under which several regions have the same distribution of noise ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

FloatArray = NDArray[np.floating[Any]]

MIN_UNITS = 5
"""Fewest units, by their effective number, that a region is matched with."""

UNITS_PER_BIN = 6
"""Units of the smallest region that a bin holds on average; there are 2 to `MAX_BINS` bins."""

MAX_BINS = 12


@dataclass(frozen=True)
class Matching:
    """Result of `match_ceilings`.

    Attributes
    ----------
    weights
        (units, regions), the given weights times the probability, up to a factor per region,
        that the unit is drawn; zeros where there is a reason.
    effective
        (regions,), effective number of units (Σw)² / Σw².
    reason
        Why the regions cannot be matched; empty where they can.
    """

    weights: FloatArray
    effective: FloatArray
    reason: str = ""


def match_ceilings(ceiling: FloatArray, weights: FloatArray, names: Sequence[str]) -> Matching:
    """Weigh units so that all regions have one distribution of the noise ceiling.

    Ceilings are cut into bins at quantiles that count every region alike. In a bin, the common
    distribution is the least share that any region has there, and a region's units are drawn
    with common share / own share: the largest sample that all regions could give, without the
    drawing. What differs inside the bins is then levelled by weights exp(λ NC), one λ per
    region, so that the mean ceilings agree exactly.

    Parameters
    ----------
    ceiling
        (units,), finite wherever a weight is above 0.
    weights
        (units, regions), 0 outside a region.
    names
        Of the regions, for the reason.

    Returns
    -------
    Matching
        With a reason where ceilings hardly overlap or a region is left with too few units.
    """
    sizes = np.count_nonzero(weights, axis=0)
    n_bins = int(np.clip(sizes.min() // UNITS_PER_BIN, 2, MAX_BINS))
    share = weights / weights.sum(axis=0)
    bins = _quantile_bins(ceiling, share.sum(axis=1), n_bins)
    held = np.stack([np.bincount(bins, part, n_bins) for part in share.T], axis=1)
    common = held.min(axis=1, keepdims=True)
    probability = np.divide(common, held, out=np.zeros_like(held), where=held > 0)
    matched = _level(ceiling, weights * probability[bins])
    if matched is None:
        return _none(weights, "the regions of the two sets have no noise ceilings in common")
    effective = np.square(matched.sum(axis=0)) / np.square(matched).sum(axis=0)
    least = int(effective.argmin())
    if effective[least] < MIN_UNITS:
        found = f"{effective[least]:.1f} units of {names[least]}"
        return _none(weights, f"matching the noise ceilings leaves {found}")
    return Matching(matched, effective)


def _quantile_bins(values: FloatArray, mass: FloatArray, n_bins: int) -> NDArray[np.int64]:
    """Bin of every value, (units,), for bins of equal mass."""
    used = mass > 0
    order = np.argsort(values[used])
    cumulative = np.cumsum(mass[used][order])
    targets = np.arange(1, n_bins) / n_bins * cumulative[-1]
    edges = values[used][order][np.searchsorted(cumulative, targets)]
    # Without a value, units of no mass go anywhere.
    return np.searchsorted(edges, values, side="right")


def _level(ceiling: FloatArray, weights: FloatArray) -> FloatArray | None:
    """Tilt each region's weights so that all have the same mean ceiling; None if none can."""
    if not weights.any(axis=0).all():
        return None
    values = np.where(weights.any(axis=1), ceiling, 0.0)
    target = float((values @ weights / weights.sum(axis=0)).mean())
    levelled = weights.copy()
    for column in levelled.T:
        used = column > 0
        centred = values[used] - target
        if abs(np.average(centred, weights=column[used])) < 1e-12:
            continue
        if not centred.min() < 0 < centred.max():
            return None
        column[used] *= _tilt(centred / np.abs(centred).max(), column[used])
    return levelled


def _tilt(centred: FloatArray, weights: FloatArray) -> FloatArray:
    """Factors exp(λx), the largest 1, under which the weighted mean of x is 0."""

    def factors(strength: float) -> FloatArray:
        return np.exp(strength * centred - np.max(strength * centred))

    def excess(strength: float) -> float:
        return float(np.sum(weights * factors(strength) * centred))

    bound = 1.0
    while excess(-bound) > 0 or excess(bound) < 0:
        bound *= 2
    return factors(brentq(excess, -bound, bound))


def _none(weights: FloatArray, reason: str) -> Matching:
    return Matching(np.zeros_like(weights), np.zeros(weights.shape[1]), reason)
