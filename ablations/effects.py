"""Effects of the streams: from predictions under coalitions to tidy rows with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ablations.quantities import INTERCHANGE, Condition
from ablations.rows import COLUMNS, Tables, frame_of
from ablations.scales import make_scales
from ablations.significance import adjust, sign_flips
from ablations.sums import (
    ColumnScores,
    Gain,
    gain_of_interchange,
    gain_of_prediction,
    score_columns,
)
from ablations.values import (
    COALITIONS,
    CoalitionValues,
    FloatArray,
    TestSet,
    check_test_set,
    check_values,
)
from chasm.evaluation.bootstrap import check_resamples, resample_counts

__all__ = ["COALITIONS", "COLUMNS", "CoalitionValues", "Effects", "TestSet", "effects", "pooled"]

POOLED = "all"
"""Seed of the rows that pool over seeds."""

MIN_SEEDS = 3
"""Fewest seeds that are taken for a sample of trainings; rows of fewer say how many."""


@dataclass(frozen=True)
class Effects:
    """Effects of every encoder of a subject.

    Attributes
    ----------
    frame
        Tidy table, one row per number; see `effects`.
    test
        The test images.
    unit_r2
        Encoder to coalition to (units,): R² of every unit, the mean over seeds, the gate free;
        NaN where the responses are constant.
    """

    frame: pd.DataFrame
    test: TestSet
    unit_r2: Mapping[str, Mapping[str, FloatArray]]


def effects(
    values: Sequence[CoalitionValues], test: TestSet, *, permutations: int = 9999
) -> Effects:
    """Compute every effect of every encoder, per region, with paired intervals.

    For a coalition S of streams left intact, v(S) is Σ R² / Σ noise ceiling over the units of
    a region, R² with the train mean as reference. All quantities are sums of such values
    (`ablations.quantities`) and all use the same resamples of the images, in which both sums
    of R² are formed again. With several seeds of an encoder there are rows of every seed and
    rows ``all``: values averaged over seeds, intervals from resampling seeds and images together.

    Parameters
    ----------
    values
        One entry per checkpoint.
    test
        The test images.
    permutations
        Random sign flips for p; 0 for none.

    Returns
    -------
    Effects
        Columns of the frame: subject, dataset, simulated; encoder, model_class, seed (a number
        as text, or ``all``); level, atlas, region (level ``set``: ``early``, ``higher``, the
        means over the regions of a set, and ``early - higher``); n_units, n_voxels, mean_ceiling;
        quantity; gate (``free``, ``held``; empty without a gate, and for compensation); scale
        (`ablations.scales.Scale`); value, low, high (95 % percentile interval); p (sign flips), q
        (Benjamini–Hochberg over the ROIs); status (``ok``, ``ok: <note>`` or ``not estimable:
        <reason>``, then the numbers are NaN).

    Raises
    ------
    DataError
        Predictions or test set are incomplete or do not fit together.
    ConfigError
        A region is in both sets, or the number of resamples is below 100.
    """
    check_resamples(test.n_boot)
    check_test_set(test)
    check_values(values, test)
    scales, sets = make_scales(test)
    summed = [scale for scale in scales if scale.source == scale.name]
    resamples = resample_counts(test.n_images, test.n_boot, test.seed_of_bootstrap)
    scores = score_columns(
        {
            (index, condition): gain
            for index, one in enumerate(values)
            for condition, gain in _gains(one, test.train_mean).items()
        },
        np.asarray(test.target, np.float64) - test.train_mean,
        np.concatenate([np.ones((1, test.n_images)), resamples]),
        np.concatenate([scale.weights for scale in summed], axis=1),
        np.concatenate([scale.worth for scale in summed], axis=1),
    )
    signs = sign_flips(test.n_images, permutations, test.seed_of_bootstrap)
    frames, unit_r2 = [], {}
    for encoder in dict.fromkeys(one.encoder for one in values):
        group = [index for index, one in enumerate(values) if one.encoder == encoder]
        pools = {str(values[index].seed): [index] for index in group}
        if len(group) > 1:
            pools |= {POOLED: group}
        for label, members in pools.items():
            tables = _pool(scores, members, test)
            start = {"encoder": encoder, "model_class": values[group[0]].model_class, "seed": label}
            note = f"{len(members)} seeds" if 1 < len(members) < MIN_SEEDS else ""
            frames.append(frame_of(start, tables, test, scales, sets, signs, note))
        unit_r2[encoder] = _unit_r2(scores, group)
    frame = adjust(frames) if frames else pd.DataFrame(columns=COLUMNS)
    return Effects(frame[COLUMNS], test, unit_r2)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of every encoder over all its seeds: ``all``, or those of its only seed."""
    several = frame.groupby(["subject", "encoder"])["seed"].transform("nunique") > 1
    return frame[~several | (frame["seed"] == POOLED)]


def _gains(one: CoalitionValues, train_mean: FloatArray) -> dict[Condition, Gain]:
    """Every condition of a checkpoint, to the squared error that it saves."""
    gate = "" if one.held is None else "free"
    predictions = {Condition(gate, name): one.predictions[name] for name in COALITIONS}
    if one.held is not None:
        predictions |= {Condition("held", name): one.held[name] for name in COALITIONS}
    predictions |= {Condition(gate, name, "extra"): made for name, made in one.extra.items()}
    gains = {key: gain_of_prediction(made, train_mean) for key, made in predictions.items()}
    if one.interchange is not None:
        key = Condition(gate, INTERCHANGE, INTERCHANGE)
        gains[key] = gain_of_interchange(*one.interchange, train_mean)
    return gains


def _pool(
    scores: Mapping[tuple[int, Condition], ColumnScores], members: Sequence[int], test: TestSet
) -> Tables:
    """Average checkpoints in the conditions that all have; in a resample, over draws of them."""
    conditions = [
        condition
        for index, condition in scores
        if index == members[0] and all((other, condition) in scores for other in members)
    ]
    n = len(members)
    rng = np.random.default_rng([test.seed_of_bootstrap, n])
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=test.n_boot) / n
    share = np.concatenate([np.full((1, n), 1 / n), drawn])
    values, terms = [], []
    for condition in conditions:
        parts = [scores[index, condition] for index in members]
        values.append(sum(w[:, None] * one.values for w, one in zip(share.T, parts, strict=True)))
        terms.append(sum(one.terms for one in parts) / n)
    return Tables(conditions, np.stack(values), np.stack(terms))


def _unit_r2(
    scores: Mapping[tuple[int, Condition], ColumnScores], members: Sequence[int]
) -> dict[str, FloatArray]:
    found: dict[str, list[FloatArray]] = {name: [] for name in COALITIONS}
    for (index, condition), one in scores.items():
        if index in members and condition.kind == "coalition" and condition.gate != "held":
            found[condition.name].append(one.unit_r2)
    return {name: np.mean(parts, axis=0) for name, parts in found.items()}
