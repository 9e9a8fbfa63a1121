"""Every score of one predictions file, per row and region, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chasm.evaluation.aggregate import (
    RegionTable,
    ScoredTarget,
    bootstrap_tables,
    ceiling_tables,
    image_scores_of,
    point_table,
    unit_scores_of,
)
from chasm.evaluation.bootstrap import (
    UnitScores,
    check_resamples,
    interval,
    resample_counts,
)
from chasm.evaluation.catalogue import METRICS
from chasm.evaluation.prediction_parts import MAIN_TARGET, Draws, PredictionRow, RunInfo
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.regions import Region, make_regions, weight_matrix, weighted_mean
from chasm.evaluation.sampling import compare_spreads
from chasm.noise_ceiling import noise_ceiling

FloatArray = NDArray[np.floating[Any]]

MEAN_PATTERN, NOISE_CEILING = "mean pattern", "noise ceiling"


@dataclass(frozen=True)
class Scores:
    """The scores of one predictions file.

    Attributes
    ----------
    frame
        Tidy table, one line per target, row, metric and region; see `score`.
    info
        Where the predictions come from.
    regions
        The regions scored, in order.
    unit_r2, unit_correlation
        Per row, the mean pattern among them, (units,), against the main target.
    unit_ceiling
        (units,), noise ceiling in r² units; NaN where unknown.
    n_images, n_boot, seed
        Size of the test set and of the bootstrap.
    gains
        Tidy table of every model minus each of its components on the same resamples: target,
        row, other, metric, level, atlas, region, difference, difference_low, difference_high.
    draws, spreads
        The model's draws, and their spread against that of repeats, see
        `chasm.evaluation.sampling.compare_spreads`; None where it gives none.
    """

    frame: pd.DataFrame
    info: RunInfo
    regions: tuple[Region, ...]
    unit_r2: Mapping[str, FloatArray]
    unit_correlation: Mapping[str, FloatArray]
    unit_ceiling: FloatArray
    n_images: int
    n_boot: int
    seed: int
    gains: pd.DataFrame
    draws: Draws | None = None
    spreads: pd.DataFrame | None = None


def score(
    file: PredictionFile, *, n_boot: int = 2000, seed: int = 0, nc_threshold: float = 0.0
) -> Scores:
    """Score every row of a predictions file against each of its targets.

    Parameters
    ----------
    file
        The predictions.
    n_boot
        Bootstrap resamples of the images; 0 for none (the intervals are then NaN).
    seed
        Seed of the resamples.
    nc_threshold
        Units whose noise ceiling (r²) is at or below it are left out of the noise-normalised
        scores. Fix it before looking at the scores.

    Returns
    -------
    Scores
        Columns of the frame: target, row, kind (``reference``, ``baseline``, ``component``,
        ``model``, ``ceiling``), trained_on (the target a row was fitted to), n_parameters,
        metric, level, atlas, region, n_units, n_voxels, mean_nc, target_variance, value, low,
        high (95 % percentile interval over images), left_out (units or images without a value),
        best_baseline (see `best_baseline`), difference, difference_low, difference_high (row
        minus the best baseline on the same resamples).

    Raises
    ------
    ConfigError
        If `n_boot` is negative or between 1 and 99.
    """
    check_resamples(n_boot)
    regions = make_regions(file.units, file.membership)
    counts = resample_counts(file.n_images, n_boot, seed)
    targets = _targets(file, regions, nc_threshold)
    own_rows = [{}, *(other.rows for other in file.targets.values())]
    scored = [
        _score_target(target, {**file.rows, **own}, counts)
        for target, own in zip(targets, own_rows, strict=True)
    ]
    units = scored[0].units
    return Scores(
        frame=pd.concat([part.frame for part in scored], ignore_index=True),
        info=file.info,
        regions=regions,
        unit_r2={name: scores.r2[0] for name, scores in units.items()},
        unit_correlation={name: scores.correlation[0] for name, scores in units.items()},
        unit_ceiling=targets[0].ceiling,
        n_images=file.n_images,
        n_boot=n_boot,
        seed=seed,
        gains=pd.concat([part.gains for part in scored], ignore_index=True),
        draws=file.draws,
        spreads=compare_spreads(file, regions, counts),
    )


def _targets(
    file: PredictionFile, regions: tuple[Region, ...], nc_threshold: float
) -> list[ScoredTarget]:
    """List the main target first, then the alternative ones."""
    unknown = np.full(file.n_units, np.nan)
    parts: list[tuple[str, FloatArray, FloatArray, FloatArray | None, FloatArray | None]]
    parts = [(MAIN_TARGET, file.target, file.train_mean, file.units.ncsnr, file.repeat_targets)]
    parts += [
        (name, other.values, other.train_mean, other.ncsnr, None)
        for name, other in file.targets.items()
    ]
    return [
        ScoredTarget(
            name,
            values,
            train_mean,
            unknown if ncsnr is None else noise_ceiling(ncsnr, file.repeats),
            file.repeats,
            repeat_targets,
            regions,
            nc_threshold,
        )
        for name, values, train_mean, ncsnr, repeat_targets in parts
    ]


def _predictions(target: ScoredTarget, rows: Mapping[str, PredictionRow]) -> dict[str, FloatArray]:
    """Predictions in the order of the table: the mean pattern, baselines, components, models."""
    mean_pattern = np.broadcast_to(target.train_mean, target.values.shape)
    rank = {"baseline": 0, "component": 1, "model": 2}
    models_last = sorted(rows, key=lambda name: rank[rows[name].kind])
    return {MEAN_PATTERN: mean_pattern, **{name: rows[name].values for name in models_last}}


class _ScoredRows(NamedTuple):
    """Scores against one target: tidy tables, and per row the scores of every unit."""

    frame: pd.DataFrame
    gains: pd.DataFrame
    units: dict[str, UnitScores]


def _score_target(
    target: ScoredTarget, rows: Mapping[str, PredictionRow], counts: FloatArray
) -> _ScoredRows:
    predictions = _predictions(target, rows)
    units = {name: unit_scores_of(values, target) for name, values in predictions.items()}
    images = {name: image_scores_of(values, target) for name, values in predictions.items()}
    points = {name: point_table(units[name], images[name], target) for name in predictions}
    samples = bootstrap_tables(predictions, images, target, counts)
    left_out = {name: _left_out(units[name], images[name], target) for name in predictions}
    if np.isfinite(target.ceiling).any() or target.repeat_targets is not None:
        points[NOISE_CEILING], samples[NOISE_CEILING] = ceiling_tables(target, counts)
    best = best_baseline(points, rows)
    facts = _region_facts(target)
    lines: list[dict[str, Any]] = []
    for name in points:
        start = {
            "target": target.name,
            "row": name,
            "kind": _kind(name, rows),
            "trained_on": _trained_on(name, rows, target),
            "n_parameters": rows[name].n_parameters if name in rows else None,
            "best_baseline": best,
        }
        columns = _with_interval(points[name], samples[name], ("value", "low", "high"))
        if name not in (best, NOISE_CEILING):
            columns |= _difference(points, samples, name, best)
        if name in left_out:
            columns["left_out"] = left_out[name]
        for key in METRICS:
            for index, fact in enumerate(facts):
                values = {column: table[key][index] for column, table in columns.items()}
                lines.append(start | {"metric": key} | fact | values)
    gains = _gains(target.name, points, samples, rows, facts)
    return _ScoredRows(pd.DataFrame(lines, columns=COLUMNS), gains, units)


def _gains(
    target: str,
    points: Mapping[str, RegionTable],
    samples: Mapping[str, RegionTable],
    rows: Mapping[str, PredictionRow],
    facts: list[dict[str, Any]],
) -> pd.DataFrame:
    """Every model minus each component, see `Scores.gains`."""
    lines: list[dict[str, Any]] = []
    models, others = (
        [name for name, row in rows.items() if row.kind == kind] for kind in ("model", "component")
    )
    for name, other in product(models, others):
        columns = _difference(points, samples, name, other)
        for key in METRICS:
            for index, fact in enumerate(facts):
                values = {column: table[key][index] for column, table in columns.items()}
                place = {part: fact[part] for part in ("level", "atlas", "region")}
                start = {"target": target, "row": name, "other": other, "metric": key}
                lines.append(start | place | values)
    return pd.DataFrame(lines, columns=GAIN_COLUMNS)


GAIN_COLUMNS = [
    *("target", "row", "other", "metric", "level", "atlas", "region"),
    *("difference", "difference_low", "difference_high"),
]

COLUMNS = [
    *("target", "row", "kind", "trained_on", "n_parameters"),
    *("metric", "level", "atlas", "region"),
    *("n_units", "n_voxels", "mean_nc", "target_variance", "value", "low", "high", "left_out"),
    *("best_baseline", "difference", "difference_low", "difference_high"),
]


def _difference(
    points: Mapping[str, RegionTable], samples: Mapping[str, RegionTable], name: str, other: str
) -> dict[str, dict[str, FloatArray]]:
    """Columns of one row minus another on the same resamples."""
    return _with_interval(
        {key: points[name][key] - points[other][key] for key in METRICS},
        {key: samples[name][key] - samples[other][key] for key in METRICS},
        ("difference", "difference_low", "difference_high"),
    )


def _with_interval(
    point: RegionTable, samples: RegionTable, names: tuple[str, str, str]
) -> dict[str, dict[str, FloatArray]]:
    """Columns value, low and high, each metric to (regions,)."""
    columns: dict[str, dict[str, FloatArray]] = {name: {} for name in names}
    for key in METRICS:
        columns[names[0]][key] = point[key][0]
        columns[names[1]][key], columns[names[2]][key] = interval(samples[key])
    return columns


def _left_out(
    units: UnitScores, images: RegionTable, target: ScoredTarget
) -> dict[str, FloatArray]:
    """Units, or images, of each region that have no value, by metric."""
    used = weight_matrix(target.regions) > 0
    without_r = np.isnan(units.correlation[0]).astype(np.int64) @ used
    without_r2 = np.isnan(units.r2[0]).astype(np.int64) @ used
    counts = {key: without_r2 if key.endswith("r2") else without_r for key in METRICS}
    counts["noise_normalised_signed_r2"] = without_r
    counts["mse"] = np.zeros_like(without_r)
    for key, values in images.items():
        computed = np.isfinite(values).any(axis=0) | (np.arange(values.shape[1]) == 0)
        counts[key] = np.where(computed, np.isnan(values).sum(axis=0), 0)
    return counts


def best_baseline(points: Mapping[str, RegionTable], rows: Mapping[str, PredictionRow]) -> str:
    """Name of the row that differences are taken to, the mean pattern among the candidates.

    It has the best noise-normalised R² over all units on the scored images (without a ceiling:
    the best R²). The choice is made once, not in every resample, so that the intervals of the
    differences do not include it.
    """
    candidates = [MEAN_PATTERN, *(name for name, row in rows.items() if row.kind == "baseline")]
    for key in ("noise_normalised_r2", "r2"):
        known = [name for name in candidates if np.isfinite(points[name][key][0, 0])]
        if known:
            return max(known, key=lambda name: float(points[name][key][0, 0]))
    return MEAN_PATTERN


def _trained_on(name: str, rows: Mapping[str, PredictionRow], target: ScoredTarget) -> str | None:
    """Target that a row was fitted to; the mean pattern is that of the target itself."""
    if name in rows:
        return rows[name].trained_on
    return target.name if name == MEAN_PATTERN else None


def _kind(name: str, rows: Mapping[str, PredictionRow]) -> str:
    if name in rows:
        return rows[name].kind
    return "ceiling" if name == NOISE_CEILING else "reference"


def _region_facts(target: ScoredTarget) -> list[dict[str, Any]]:
    weights = weight_matrix(target.regions)
    mean_nc = weighted_mean(target.ceiling[None], weights)[0]
    variance = np.var(np.asarray(target.values, dtype=np.float64), axis=0)
    target_variance = weighted_mean(variance[None], weights)[0]
    return [
        {
            "level": region.level,
            "atlas": region.atlas,
            "region": region.name,
            "n_units": region.n_units,
            "n_voxels": region.n_voxels,
            "mean_nc": mean_nc[index],
            "target_variance": target_variance[index],
        }
        for index, region in enumerate(target.regions)
    ]
