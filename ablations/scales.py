"""The scales that effects are given on: which units of a region count, and what divides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ablations.matching import match_ceilings
from ablations.values import FloatArray, TestSet, region_key
from chasm.evaluation.regions import Region, weight_matrix

MIN_IMAGES = 6
"""Fewest test images: with five, no sign-flip p can be below .05."""


@dataclass(frozen=True)
class Scale:
    """One way of summing R² over regions.

    Attributes
    ----------
    name
        ``r2``: mean R². ``ceiling``: Σ R² / Σ noise ceiling. ``matched``: the same with weights
        under which all regions of the two sets have the same distribution of ceilings.
        ``share``: sums as for ``ceiling`` (``r2`` where no ceiling is known), effects divided by
        what both streams predict together.
    source
        Name of the scale whose sums are used.
    weights, worth
        (units, regions), of R² and of the divisor.
    n_units, n_voxels, mean_ceiling
        (regions,), units that count (their effective number where matched), their voxels, and
        their mean noise ceiling, NaN where unknown.
    reasons
        (regions,), why there is no estimate; empty where there is one.
    """

    name: str
    source: str
    weights: FloatArray
    worth: FloatArray
    n_units: FloatArray
    n_voxels: FloatArray
    mean_ceiling: FloatArray
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class RegionSet:
    """Early or higher: the regions of a set that can be scored.

    Attributes
    ----------
    name
        ``early`` or ``higher``.
    members
        Indices of the regions.
    left_out
        Keys of regions that hold no unit to score.
    reason
        Why the set is empty; empty where it is not.
    """

    name: str
    members: tuple[int, ...]
    left_out: tuple[str, ...]
    reason: str


def make_scales(test: TestSet) -> tuple[list[Scale], tuple[RegionSet, RegionSet]]:
    """List the scales of a test set, and the two sets of the asymmetry."""
    weights = weight_matrix(test.regions)
    raw = _scale("r2", test, weights, weights)
    usable = np.isfinite(test.ceiling) & (test.ceiling > test.nc_threshold)
    kept = weights * usable[:, None]
    ceiling = np.where(usable, test.ceiling, 0.0)[:, None]
    normalised = _scale("ceiling", test, kept, kept * ceiling)
    known = normalised if usable.any() else raw
    share = replace(known, name="share")
    early = _region_set("early", test.early, test.regions, known)
    higher = _region_set("higher", test.higher, test.regions, known)
    matched = _matched(test, kept, usable, (early, higher))
    return [normalised, share, matched, raw], (early, higher)


def _scale(name: str, test: TestSet, weights: FloatArray, worth: FloatArray) -> Scale:
    known = np.where(np.isfinite(test.ceiling), test.ceiling, 0.0)
    mass = np.isfinite(test.ceiling) @ weights
    mean = np.divide(known @ weights, mass, out=np.full_like(mass, np.nan), where=mass > 0)
    reasons = [_reason(test, region, worth[:, i], name) for i, region in enumerate(test.regions)]
    n_units = np.count_nonzero(weights, axis=0).astype(np.float64)
    return Scale(name, name, weights, worth, n_units, weights.sum(axis=0), mean, tuple(reasons))


def _reason(test: TestSet, region: Region, worth: FloatArray, scale: str) -> str:
    """Say why a region cannot be scored; empty where it can."""
    if test.n_images < MIN_IMAGES:
        images = "one test image" if test.n_images == 1 else f"{test.n_images} test images"
        return f"{images}, at least {MIN_IMAGES} are needed"
    inside = region.weights > 0
    if not inside.any():
        return "no voxels"
    if scale != "r2" and not np.isfinite(test.ceiling[inside]).any():
        return "noise ceiling unknown (no repeats)"
    if not worth.any():
        return f"no unit has a noise ceiling above {test.nc_threshold:g}"
    if not np.any(test.target[:, worth > 0] != test.train_mean[worth > 0]):
        return "the responses are constant"
    return ""


def _region_set(
    name: str, keys: Sequence[str], regions: Sequence[Region], scale: Scale
) -> RegionSet:
    if not keys:
        return RegionSet(name, (), (), f"no {name} regions were given")
    place = {region_key(region): index for index, region in enumerate(regions)}
    members = tuple(place[key] for key in keys if key in place and not scale.reasons[place[key]])
    left_out = tuple(key for key in keys if place.get(key) not in members)
    if members:
        return RegionSet(name, members, left_out, "")
    why = {scale.reasons[place[key]] if key in place else "no such region" for key in keys}
    return RegionSet(
        name, (), left_out, f"no {name} region can be scored ({'; '.join(sorted(why))})"
    )


def _matched(
    test: TestSet, kept: FloatArray, usable: NDArray[np.bool_], sets: tuple[RegionSet, RegionSet]
) -> Scale:
    """Match the regions of both sets; the others have no matched values."""
    members = [*sets[0].members, *sets[1].members]
    weights, n_units = np.zeros_like(kept), np.zeros(kept.shape[1])
    reason = sets[0].reason or sets[1].reason
    if not reason and not usable.any():
        reason = "noise ceiling unknown (no repeats)"
    if not reason:
        names = [test.regions[index].name for index in members]
        matching = match_ceilings(test.ceiling, kept[:, members], names)
        weights[:, members], n_units[members] = matching.weights, matching.effective
        reason = matching.reason
    worth = weights * np.where(usable, test.ceiling, 0.0)[:, None]
    scale = _scale("matched", test, weights, worth)
    reasons = [
        reason if index in members else "in neither set of the asymmetry"
        for index in range(len(test.regions))
    ]
    return replace(scale, n_units=np.floor(n_units), reasons=tuple(reasons))
