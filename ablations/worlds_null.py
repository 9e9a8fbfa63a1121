"""The asymmetry in worlds without any: its distribution for one map of noise ceilings.

An image bootstrap asks whether this trained encoder treats early and higher ROIs differently. It
may well do so in a brain that does not: weights learned from few noisy trials are shrunk more
where the ceiling is low and where a stream has more features, and tuning differs between ROIs.
How much of an asymmetry comes from that alone is seen in simulated brains that have the
subject's own ceilings and one local share everywhere. The share of a subject is unknown, so
that it varies over the worlds, and the asymmetry is compared at the subject's own mean
specialisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from ablations.claims import SCALES
from ablations.effects import effects
from ablations.values import TestSet, region_key
from ablations.worlds import ATLAS, Layout, Sizes, make_world
from ablations.worlds_encoders import coalition_values, fit_additive, world_test_set
from chasm.errors import DataError
from chasm.evaluation.regions import Region

FloatArray = NDArray[np.floating[Any]]
Asymmetry = tuple[float, dict[str, float]]
"""Level, and asymmetry by scale."""

SHARES = (0.05, 0.95)
"""Range of the local share over null worlds."""

MIN_WORLDS = 20
"""Fewest worlds that a p is read from."""


@dataclass(frozen=True)
class NullWorlds:
    """What an encoder of worlds without asymmetry shows.

    Attributes
    ----------
    level
        (worlds,), mean specialisation of the early and the higher set, in share units.
    asymmetry
        Scale -> (worlds,), NaN where a world gives no estimate.
    """

    level: FloatArray
    asymmetry: Mapping[str, FloatArray]

    def p_values(self, level: float, asymmetry: Mapping[str, float]) -> dict[str, float]:
        """Two-sided p of an observed asymmetry, per scale.

        The expected asymmetry is a cubic function of the level, fitted to the worlds; the p is
        that of Student's t for one further observation. It is NaN where the observed value
        is, or where fewer than `MIN_WORLDS` worlds have one.
        """
        return {
            scale: _p_of_further(self.level, values, level, asymmetry[scale])
            for scale, values in self.asymmetry.items()
        }


def _p_of_further(x: FloatArray, y: FloatArray, at: float, observed: float) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    n = int(known.sum())
    if n < MIN_WORLDS or not np.isfinite([at, observed]).all():
        return float("nan")
    design, here = np.vander(x[known], 4), np.vander([at], 4)[0]
    weights, *_ = np.linalg.lstsq(design, y[known], rcond=None)
    freedom = n - design.shape[1]
    variance = np.square(y[known] - design @ weights).sum() / freedom
    leverage = here @ np.linalg.pinv(design.T @ design) @ here
    t = (observed - here @ weights) / np.sqrt(variance * (1 + leverage))
    return float(2 * stats.t.sf(abs(t), freedom))


def asymmetry_of(frame: pd.DataFrame) -> Asymmetry:
    """Level and asymmetry per scale of one encoder, from the rows of its gate-free effects.

    Parameters
    ----------
    frame
        Rows of `ablations.effects.Effects.frame` of one encoder and one seed.
    """
    rows = frame[(frame["level"] == "set") & (frame["gate"] != "held")]
    level = rows[(rows["quantity"] == "specialisation") & (rows["scale"] == "share")]["value"]
    asymmetry = rows[rows["quantity"] == "asymmetry"].set_index("scale")["value"]
    return float(level.mean(skipna=False)), {s: float(asymmetry.get(s, np.nan)) for s in SCALES}


def null_p(null: NullWorlds, frame: pd.DataFrame) -> float | None:
    """Largest p over the scales that a claim needs, or None where one of them has none.

    Parameters
    ----------
    null
        Worlds with the subject's ceilings.
    frame
        See `asymmetry_of`.
    """
    p = max(null.p_values(*asymmetry_of(frame)).values(), key=lambda x: np.inf if x != x else x)
    return None if np.isnan(p) else p


def null_layout(
    ceiling: FloatArray,
    regions: Sequence[Region],
    early: Sequence[str],
    higher: Sequence[str],
    sizes: Sizes,
    rng: np.random.Generator,
) -> tuple[Layout, tuple[str, ...], tuple[str, ...]]:
    """Take the ROIs of both sets and their ceilings from a subject, the share still open.

    Parameters
    ----------
    ceiling
        (units,), NC of the mean test response; units without one above 0 are left out.
    regions, early, higher
        As in `ablations.values.TestSet`; a unit in several regions of the sets belongs to the
        first.
    sizes
        Of which `n_voxels` is the most units kept of a region, drawn at random, and `repeats`
        the trials of a test image.
    rng
        Of that draw.

    Returns
    -------
    layout : Layout
        With a local share of NaN.
    early, higher : tuple of str
        Keys of the regions that have units.

    Raises
    ------
    DataError
        A set has no unit with a ceiling above 0.
    """
    place = {region_key(region): region for region in regions}
    free = np.isfinite(ceiling) & (ceiling > 0)
    names, units = [], []
    for key in (*early, *higher):
        if key not in place:
            continue
        found = np.flatnonzero(free & (place[key].weights > 0))
        if not len(found):
            continue
        free[found] = False
        names.append(key)
        units.append(rng.permutation(found)[: sizes.n_voxels])
    kept = tuple(tuple(_key(k) for k in keys if k in names) for keys in (early, higher))
    if not all(kept):
        raise DataError(
            "null worlds",
            "early or higher regions without a unit whose noise ceiling is above 0",
            "Give regions with repeated images, or make no claim of asymmetry.",
        )
    chosen = np.minimum(ceiling[np.concatenate(units)], 0.99)
    layout = Layout(
        tuple(name.replace(":", " ") for name in names),
        np.repeat(np.arange(len(units)), [len(u) for u in units]),
        np.full(len(chosen), np.nan),
        chosen / (sizes.repeats * (1 - chosen)),
    )
    return layout, kept[0], kept[1]


def _key(key: str) -> str:
    return f"{ATLAS}:{key.replace(':', ' ')}"


def subject_sizes(n_train: int, n_test: int, n_repeated: int, repeats: int) -> Sizes:
    """Give sizes of a subject's null worlds: its own, no larger than those of the calibration.

    Parameters
    ----------
    n_train, n_test
        Images of the subject.
    n_repeated
        Images that its noise ceiling was estimated from.
    repeats
        Trials of a test image.
    """
    most = Sizes()
    n_train, n_test = min(n_train, most.n_train), min(n_test, most.n_test)
    n_repeated = int(np.clip(n_repeated - n_train - n_test, 0, most.n_repeated))
    return replace(
        most,
        n_train=n_train,
        n_test=n_test,
        n_population=0,
        n_repeated=n_repeated,
        repeats=max(2, repeats),
    )


def null_worlds(test: TestSet, sizes: Sizes, n: int, seed: int) -> NullWorlds:
    """Simulate and fit worlds with a subject's ceilings and one local share everywhere.

    Parameters
    ----------
    test
        The subject, of which the ceilings, the regions and the two sets are used.
    sizes
        Of every world, see `subject_sizes`.
    n
        Worlds.
    seed
        World k depends on the seed and k only.
    """
    found = list(_each(test, sizes, n, seed))
    return NullWorlds(
        np.array([level for level, _ in found]),
        {scale: np.array([values[scale] for _, values in found]) for scale in SCALES},
    )


def _each(test: TestSet, sizes: Sizes, n: int, seed: int) -> Iterator[Asymmetry]:
    for k in range(n):
        rng = np.random.default_rng([seed, k])
        layout, early, higher = null_layout(
            test.ceiling, test.regions, test.early, test.higher, sizes, rng
        )
        share = np.full(len(layout.q), rng.uniform(*SHARES))
        world = make_world(replace(layout, local_share=share), sizes, rng)
        encoder = fit_additive(world, 0, rng)
        seen = world_test_set(world, early, higher, n_boot=0, seed=0)
        yield asymmetry_of(effects([coalition_values(encoder)], seen, permutations=0).frame)
