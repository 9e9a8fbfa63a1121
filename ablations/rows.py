"""From values in every resample to the rows of the table: quantities, intervals, p, status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ablations.quantities import TESTED, Condition, Quantity, predicted, quantities_of
from ablations.scales import RegionSet, Scale
from ablations.significance import sign_flip_p
from ablations.values import FloatArray, TestSet, region_key
from chasm.evaluation.bootstrap import interval

COLUMNS = [
    *("subject", "dataset", "simulated", "encoder", "model_class", "seed"),
    *("level", "atlas", "region", "n_units", "n_voxels", "mean_ceiling"),
    *("quantity", "gate", "scale", "value", "low", "high", "p", "q", "status"),
]

NOT_ESTIMABLE = "not estimable: "
NOTHING = "what both streams predict is not above 0"
COMPARED = ("specialisation", "asymmetry")
"""Quantities that compare the streams: without meaning where nothing is predicted."""
EARLY_LESS_HIGHER = "early - higher"


class Tables(NamedTuple):
    """Values of one encoder under its conditions.

    Attributes
    ----------
    conditions
        Names of the first axis.
    values
        (conditions, 1 + resamples, columns), first on the images as they are.
    terms
        (conditions, images, columns), what each image adds to the first.
    """

    conditions: Sequence[Condition]
    values: FloatArray
    terms: FloatArray


class _Place(NamedTuple):
    """Where a row is scored: a region, or the mean over the regions of a set."""

    level: str
    atlas: str
    region: str
    n_units: float
    n_voxels: float
    mean_ceiling: float
    members: tuple[int, ...]
    reason: str
    nothing: str
    note: str


class _Grid(NamedTuple):
    """Numbers of some quantities at some places: samples, contrasts (quantities, ·, places)."""

    quantities: Sequence[Quantity]
    places: Sequence[_Place]
    samples: FloatArray
    contrasts: FloatArray


def frame_of(
    start: Mapping[str, Any],
    tables: Tables,
    test: TestSet,
    scales: Sequence[Scale],
    sets: tuple[RegionSet, RegionSet],
    signs: FloatArray,
    note: str = "",
) -> pd.DataFrame:
    """Make the rows of one encoder.

    Parameters
    ----------
    start
        Columns that are the same in all rows.
    tables
        Values of the encoder; their columns are the regions in every scale that has sums of
        its own, in the order of `scales`.
    test, scales, sets
        See `ablations.scales.make_scales`.
    signs
        (permutations, images) for p.
    note
        Said in the status of rows that could be estimated.

    Returns
    -------
    DataFrame
        `COLUMNS`, without q.
    """
    quantities = quantities_of(tables.conditions)
    summed = [scale.name for scale in scales if scale.source == scale.name]
    n_regions = len(test.regions)
    frames = []
    for scale in scales:
        first = summed.index(scale.source) * n_regions
        own = slice(first, first + n_regions)
        part = Tables(tables.conditions, tables.values[..., own], tables.terms[..., own])
        grid = _grid(quantities, part, test, scale, sets)
        for one in (grid, _asymmetry(grid, sets)):
            frames.append(_rows(one, signs, note).assign(scale=scale.name))
    facts: dict[str, Any] = {k: getattr(test, k) for k in ("subject", "dataset", "simulated")}
    frame = pd.concat(frames, ignore_index=True).assign(**facts, **start, q=np.nan)
    return frame[COLUMNS]


def _grid(
    quantities: Sequence[Quantity],
    tables: Tables,
    test: TestSet,
    scale: Scale,
    sets: tuple[RegionSet, RegionSet],
) -> _Grid:
    """Quantities in every region of a scale, and their means over both sets."""
    reasons = list(scale.reasons)
    if scale.name == "share":
        quantities = [one for one in quantities if not one.name.startswith("v")]
    samples, contrasts = (
        _combine(quantities, tables.conditions, part) for part in (tables.values, tables.terms)
    )
    unit = _combine([predicted(tables.conditions)], tables.conditions, tables.values)[0]
    low = unit[0] if len(unit) == 1 else np.minimum(unit[0], interval(unit[1:])[0])
    nothing = [one or NOTHING * bool(le0) for one, le0 in zip(reasons, low <= 0, strict=True)]
    if scale.name == "share":
        unit = np.where(unit == 0, np.nan, unit)
        samples, contrasts = samples / unit, contrasts / unit[0]
        reasons = nothing
    places = [
        _region_place(test, scale, index, reasons[index], nothing[index])
        for index in range(len(reasons))
        if scale.name != "matched" or any(index in one.members for one in sets)
    ]
    places += [_set_place(one, test, scale, reasons, nothing) for one in sets]
    return _Grid(quantities, places, *(_at(places, part) for part in (samples, contrasts)))


def _asymmetry(grid: _Grid, sets: tuple[RegionSet, RegionSet]) -> _Grid:
    """Specialisation of the early regions less that of the higher ones."""
    chosen = [i for i, one in enumerate(grid.quantities) if one.name == "specialisation"]
    quantities = [grid.quantities[index]._replace(name="asymmetry") for index in chosen]
    early, higher = grid.places[-2:]
    place = early._replace(
        region=EARLY_LESS_HIGHER,
        n_units=early.n_units + higher.n_units,
        n_voxels=early.n_voxels + higher.n_voxels,
        mean_ceiling=(early.mean_ceiling + higher.mean_ceiling) / 2,
        reason=_joined(early.reason, higher.reason),
        nothing=_joined(early.nothing, higher.nothing),
        note=_joined(early.note, higher.note),
    )
    less = [part[chosen][..., -2:-1] - part[chosen][..., -1:] for part in grid[2:]]
    return _Grid(quantities, [place], *less)


def _combine(
    quantities: Sequence[Quantity], conditions: Sequence[Condition], values: FloatArray
) -> FloatArray:
    """Weighted sums over conditions: (conditions, ...) to (quantities, ...)."""
    coefficients = [[one.parts.get(name, 0.0) for name in conditions] for one in quantities]
    return np.tensordot(np.array(coefficients), values, axes=1)


def _at(places: Sequence[_Place], values: FloatArray) -> FloatArray:
    """Mean over the members of every place: (..., regions) to (..., places)."""
    result = np.full((*values.shape[:-1], len(places)), np.nan)
    for index, place in enumerate(places):
        if place.members:
            result[..., index] = values[..., list(place.members)].mean(axis=-1)
    return result


def _joined(*texts: str) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _region_place(test: TestSet, scale: Scale, index: int, reason: str, nothing: str) -> _Place:
    region = test.regions[index]
    facts = (scale.n_units[index], scale.n_voxels[index], scale.mean_ceiling[index])
    where = (region.level, region.atlas, region.name)
    return _Place(*where, *facts, (index,), reason, nothing, "")


def _set_place(
    chosen: RegionSet,
    test: TestSet,
    scale: Scale,
    reasons: Sequence[str],
    nothing: Sequence[str],
) -> _Place:
    members = list(chosen.members)

    def common(found: Sequence[str]) -> str:
        failed = [f"{region_key(test.regions[i])}: {found[i]}" for i in members if found[i]]
        distinct = {found[index] for index in members}
        return chosen.reason or (distinct.pop() if len(distinct) == 1 else "; ".join(failed))

    mean_ceiling = float(scale.mean_ceiling[members].mean()) if members else np.nan
    sums = (scale.n_units[members].sum(), scale.n_voxels[members].sum(), mean_ceiling)
    note = f"without {', '.join(chosen.left_out)}" if chosen.left_out else ""
    texts = (common(reasons), common(nothing), note)
    return _Place("set", "", chosen.name, *sums, chosen.members, *texts)


def _rows(grid: _Grid, signs: FloatArray, note: str) -> pd.DataFrame:
    """Rows of a grid, places within quantities."""
    shape = (len(grid.quantities), len(grid.places))
    value = grid.samples[:, 0]
    low, high = interval(np.moveaxis(grid.samples[:, 1:], 1, 0))
    tested = [one.name in TESTED for one in grid.quantities]
    p = np.full(shape, np.nan)
    contrasts = np.moveaxis(grid.contrasts[tested], 1, 0)
    p[tested] = sign_flip_p(contrasts.reshape(len(contrasts), -1), signs).reshape(-1, shape[1])
    status = _status(grid, value, low, note)
    estimable = ~np.char.startswith(status, NOT_ESTIMABLE)
    numbers = {"value": value, "low": low, "high": high, "p": p}
    places = pd.DataFrame(grid.places).drop(columns=["members", "reason", "nothing", "note"])
    return (
        places.iloc[np.tile(np.arange(shape[1]), shape[0])]
        .reset_index(drop=True)
        .assign(
            n_units=lambda frame: frame["n_units"].astype(np.int64),
            n_voxels=lambda frame: frame["n_voxels"].round().astype(np.int64),
            quantity=np.repeat([one.name for one in grid.quantities], shape[1]),
            gate=np.repeat([one.gate for one in grid.quantities], shape[1]),
            **{key: np.where(estimable, part, np.nan).ravel() for key, part in numbers.items()},
            status=status.ravel(),
        )
    )


def _status(grid: _Grid, value: FloatArray, low: FloatArray, note: str) -> NDArray[np.str_]:
    """Say what may be made of every number: (quantities, places)."""
    notes = [_joined(note, place.note) for place in grid.places]
    fine = [f"ok: {text}" if text else "ok" for text in notes]
    reasons = [
        [place.nothing if one.name in COMPARED else place.reason for place in grid.places]
        for one in grid.quantities
    ]
    status = np.array(
        [
            [f"{NOT_ESTIMABLE}{why}" if why else ok for why, ok in zip(row, fine, strict=True)]
            for row in reasons
        ]
    ).reshape(value.shape)
    failed = np.array(reasons, dtype=bool).reshape(value.shape)
    resampled = grid.samples.shape[1] > 1
    undefined = ~np.isfinite(value) | (resampled & ~np.isfinite(low))
    why = f"{NOT_ESTIMABLE}the responses are constant in some resamples"
    return np.where(undefined & ~failed, why, status)
