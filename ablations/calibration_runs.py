"""One run of the calibration: a world, its encoder, its effects, and the truth beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ablations.claims import claim
from ablations.effects import effects
from ablations.quantities import COALITION_QUANTITIES
from ablations.rows import EARLY_LESS_HIGHER
from ablations.scales import make_scales
from ablations.values import CoalitionValues, TestSet
from ablations.worlds import (
    EARLY,
    HIGHER,
    Multiplicative,
    Sizes,
    World,
    make_layout,
    make_world,
    region_keys,
)
from ablations.worlds_encoders import (
    coalition_values,
    fit_additive,
    fit_interacting,
    population_r2,
    world_test_set,
)
from ablations.worlds_null import asymmetry_of, null_worlds
from chasm.io import digest, sha256_of_file

FloatArray = NDArray[np.floating[Any]]
Key = tuple[str, str, str, str]
"""Quantity, region or set, scale, gate."""

IDEAL = "ideal observer"
DONORS = 20
RESAMPLES = 1000


FULL = Sizes()

_SOURCES = [
    sha256_of_file(path)
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem.startswith("worlds")
    or path.stem in ("calibration_runs", "claims", "effects", "matching", "quantities")
    or path.stem in ("rows", "scales", "sums", "values")
]


@dataclass(frozen=True)
class Variant:
    """One kind of world of the calibration.

    Attributes
    ----------
    name
        Row of the table, and name of its file.
    local_share, ceiling
        (early, higher): planted w, and median noise ceiling of three trials.
    leak, interaction, multiplicative
        See `ablations.worlds.make_world`.
    encoder
        ``additive``: banded ridge; ``product``, ``gain``: with products of CLS features, or of
        their squares, and patch features; ``gated``: a Stage 1 trained with stream dropout.
    sizes
        Of the world.
    null_worlds
        Worlds without asymmetry that are simulated from every run's own ceilings.
    many
        Whether this is one of the cells with the larger number of runs.
    """

    name: str
    local_share: tuple[float, float]
    ceiling: tuple[float, float] = (0.37, 0.12)
    leak: float = 0.0
    interaction: float = 0.0
    multiplicative: Multiplicative = "product"
    encoder: Literal["additive", "product", "gain", "gated"] = "additive"
    sizes: Sizes = FULL
    null_worlds: int = 0
    many: bool = False

    @property
    def digest(self) -> str:
        """Changes with the variant, and with the code of worlds, encoders and effects."""
        return digest([asdict(self), *_SOURCES])


_SMALL = Sizes(n_voxels=24, n_categories=3, n_scenes=0, side=3, n_channels=2)
_GATED = Sizes(n_train=1000, n_test=300, n_population=500, n_repeated=500, n_voxels=8, side=3)
_MULTIPLIED: dict[str, Any] = {"ceiling": (0.6, 0.6), "interaction": 0.3, "sizes": _SMALL}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("planted", (0.9, 0.2), null_worlds=1, many=True),
        Variant("reversed", (0.1, 0.8), null_worlds=1, many=True),
        Variant("null", (0.5, 0.5), (0.25, 0.25), null_worlds=1, many=True),
        Variant("SNR-confounded null", (0.5, 0.5), null_worlds=1, many=True),
        Variant("main effect only", (0.75, 0.75), null_worlds=1),
        Variant("redundant", (0.5, 0.5), leak=0.95, null_worlds=1),
        Variant("interaction", (0.5, 0.5), encoder="product", **_MULTIPLIED),
        Variant(
            "interaction (gain)", (0.5, 0.5), multiplicative="gain", encoder="gain", **_MULTIPLIED
        ),
        Variant("pure noise", (0.5, 0.5), (0.0, 0.0)),
        Variant(
            "gate-compensated", (0.2, 0.2), (0.6, 0.6), leak=0.9, encoder="gated", sizes=_GATED
        ),
    )
}
"""The variants of the specification; the interaction in two forms."""


def run(variant: Variant, seed: int) -> dict[str, Any]:
    """Simulate, fit and judge one world.

    Parameters
    ----------
    variant
        What is planted.
    seed
        Of the run; a run depends on nothing else.

    Returns
    -------
    dict
        JSON values: variant, digest, seed, claim (by the rule without null worlds), sign, level
        and asymmetry (see `ablations.worlds_null.asymmetry_of`), null (the same of the null
        worlds), rows: [quantity, region, scale, gate, value, low, high, truth].
    """
    rng = np.random.default_rng([seed, *variant.name.encode()])
    layout = make_layout(
        variant.local_share, variant.ceiling, variant.sizes.n_voxels, variant.sizes.repeats, rng
    )
    world = make_world(
        layout,
        variant.sizes,
        rng,
        leak=variant.leak,
        interaction=variant.interaction,
        multiplicative=variant.multiplicative,
    )
    test = world_test_set(
        world, region_keys(EARLY), region_keys(HIGHER), n_boot=RESAMPLES, seed=seed
    )
    values, r2 = _fit(variant, world, test, rng)
    # Every predictor knows the train mean; the ideal one also all that depends on the image.
    offset = test.train_mean - world.expected(world.train).mean(axis=0)
    values = replace(values, extra={IDEAL: world.expected(world.test) + offset})
    found = effects([values], test, permutations=0)
    made = claim(found)
    level, asymmetry = asymmetry_of(found.frame)
    sizes = replace(variant.sizes, n_population=0)
    null = null_worlds(test, sizes, variant.null_worlds, int(rng.integers(2**31)))
    truth = population_effects(test, r2, world.ceiling) if r2 else {}
    kept = found.frame[
        (found.frame["level"] == "set")
        | ((found.frame["quantity"] == "specialisation") & (found.frame["scale"] == "ceiling"))
    ]
    columns = ["quantity", "region", "scale", "gate"]
    rows = [
        [*row, truth.get((row[0], row[1], row[2], ""), float("nan"))]
        for row in kept[[*columns, "value", "low", "high"]].itertuples(index=False)
    ]
    return {
        "variant": variant.name,
        "digest": variant.digest,
        "seed": seed,
        "claim": made.kind,
        "sign": made.sign,
        "level": level,
        "asymmetry": asymmetry,
        "null": {"level": list(null.level), **{s: list(v) for s, v in null.asymmetry.items()}},
        "rows": rows,
    }


def _fit(
    variant: Variant, world: World, test: TestSet, rng: np.random.Generator
) -> tuple[CoalitionValues, dict[str, FloatArray]]:
    """Fit the encoder of a variant; also its R2 over the population, empty where not computed."""
    if variant.encoder == "gated":
        # Torch takes seconds to import, and no other variant needs it.
        from ablations.worlds_gated import fit_gated

        return fit_gated(world, rng), {}
    if variant.encoder == "additive":
        encoder = fit_additive(world, 0, rng)
    else:
        encoder = fit_interacting(world, DONORS, rng, 1 if variant.encoder == "product" else 2)
    return coalition_values(encoder), population_r2(world, encoder.population, test.train_mean)


def population_effects(
    test: TestSet, r2: Mapping[str, FloatArray], ceiling: FloatArray
) -> dict[Key, float]:
    """Effects without any sampling error, of the units and weights that a test set uses.

    Parameters
    ----------
    test
        Whose scales, regions and sets are used.
    r2
        Coalition -> (units,), R2 over the population.
    ceiling
        (units,), the true noise ceiling.

    Returns
    -------
    dict
        (quantity, region or set, scale, "") -> value, for every quantity of coalitions.
    """
    scales, sets = make_scales(test)
    places: dict[str, tuple[int, ...]] = {one.name: one.members for one in sets}
    places |= {region.name: (index,) for index, region in enumerate(test.regions)}
    found: dict[Key, float] = {}
    for scale in scales:
        worth = scale.weights if scale.name == "r2" else scale.weights * ceiling[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            v = {name: values @ scale.weights / worth.sum(axis=0) for name, values in r2.items()}
            unit = v["both"] - v["none"] if scale.name == "share" else 1.0
            for quantity, parts in COALITION_QUANTITIES.items():
                value = sum(weight * v[name] for name, weight in parts.items()) / unit
                for place, members in places.items():
                    found[quantity, place, scale.name, ""] = float(value[list(members)].mean())
        key = (scale.name, "")
        early, higher = (found["specialisation", one.name, *key] for one in sets)
        found["asymmetry", EARLY_LESS_HIGHER, *key] = early - higher
    return found
