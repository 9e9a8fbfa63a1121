"""Where units are scored together: everywhere, in stream groups, in each ROI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chasm.data.nsd import STREAM_GROUPS
from chasm.evaluation.prediction_parts import Membership, Units

FloatArray = NDArray[np.floating[Any]]
Level = Literal["all", "group", "roi"]

MASK_ATLAS = "nsdgeneral"
"""Atlas that NSD's voxels are usually chosen with."""

MIN_PATTERN_UNITS = 10
"""Fewest units over which a pattern correlation is computed."""


@dataclass(frozen=True)
class Region:
    """A weighted set of units.

    Attributes
    ----------
    name
        E.g. ``all``, ``Early``, ``V1v``.
    level
        ``all``, ``group`` (Early, Mid, Higher) or ``roi``.
    atlas
        Atlas of an ROI or group, empty for ``all``.
    weights
        (units,), voxels of each unit in the region.
    members
        Indices of the units that lie mostly (more than half of their voxels) in the region:
        the units of its pattern correlations.
    """

    name: str
    level: Level
    atlas: str
    weights: FloatArray
    members: NDArray[np.int64]

    @property
    def n_units(self) -> int:
        """Units with at least one voxel in the region."""
        return int(np.count_nonzero(self.weights))

    @property
    def n_voxels(self) -> int:
        """Voxels of those units that lie in the region."""
        return round(float(self.weights.sum()))


def make_regions(units: Units, membership: Mapping[str, Membership]) -> tuple[Region, ...]:
    """List all units, then Early / Mid / Higher, then every ROI that holds a voxel.

    The groups are sums of ROIs of the `streams` atlas and absent without it. The atlas
    `MASK_ATLAS` is left out where it holds every voxel, that is where it was the mask.
    """
    size = np.asarray(units.size, dtype=np.float64)
    regions = [Region("all", "all", "", size, np.arange(len(size)))]
    streams = membership.get("streams")
    if streams is not None:
        for name, parts in STREAM_GROUPS.items():
            columns = [streams.names.index(part) for part in parts if part in streams.names]
            counts = streams.counts[:, columns].sum(axis=1)
            regions.append(_region(name, "group", "streams", counts, size))
    for atlas, table in membership.items():
        if atlas == MASK_ATLAS and np.array_equal(table.counts.sum(axis=1), size):
            continue
        for column, name in enumerate(table.names):
            regions.append(_region(name, "roi", atlas, table.counts[:, column], size))
    return tuple(region for region in regions if region.n_voxels > 0)


def _region(name: str, level: Level, atlas: str, counts: Any, size: FloatArray) -> Region:
    weights = np.asarray(counts, dtype=np.float64)
    return Region(name, level, atlas, weights, np.flatnonzero(weights > size / 2))


def weight_matrix(regions: Sequence[Region]) -> FloatArray:
    """Weights as (units, regions) float64."""
    return np.stack([region.weights for region in regions], axis=1)


def weighted_mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean over units, NaN units left out.

    Parameters
    ----------
    values
        (..., units).
    weights
        (units, regions).

    Returns
    -------
    ndarray
        (..., regions); NaN where a region has no unit with a value.
    """
    summed, total = sums_over_units(values, weights, np.ones(values.shape[-1]))
    return np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0)


def sums_over_units(
    values: FloatArray, weights: FloatArray, other: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Weighted sums of values, and of another quantity, over the units that have a value.

    Parameters
    ----------
    values
        (..., units), NaN where there is none.
    weights
        (units, regions).
    other
        (units,).

    Returns
    -------
    values, other
        Each (..., regions).
    """
    valid = np.isfinite(values)
    if valid.all():
        summed = values @ weights
        return summed, np.broadcast_to(other @ weights, summed.shape)
    return np.where(valid, values, 0.0) @ weights, (valid * other) @ weights


def weighted_median(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Median over units where each unit counts as often as its weight, NaN units left out.

    Parameters
    ----------
    values
        (samples, units).
    weights
        (units,), non-negative.

    Returns
    -------
    ndarray
        (samples,); equals ``numpy.median(numpy.repeat(values, weights))``.
    """
    used = (weights > 0) & np.isfinite(values).any(axis=0)
    values, weights = values[:, used], weights[used]
    if values.shape[1] == 0:
        return np.full(len(values), np.nan)
    complete = np.isfinite(values).all()
    if complete and np.all(weights == weights[0]):
        return np.median(values, axis=1)
    order = np.argsort(values, axis=1)  # NaN last
    sorted_values = np.take_along_axis(values, order, axis=1)
    sorted_weights = np.where(np.isfinite(sorted_values), weights[order], 0.0)
    cumulative = np.cumsum(sorted_weights, axis=1)
    half = cumulative[:, -1:] / 2
    # Sums of integer weights are exact, so the two middle values are found exactly.
    lower = np.argmax(cumulative >= half, axis=1)
    upper = np.argmax(cumulative > half, axis=1)
    rows = np.arange(len(values))
    return (sorted_values[rows, lower] + sorted_values[rows, upper]) / 2
