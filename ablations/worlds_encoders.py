"""Encoders fitted to a simulated brain, what they say with streams replaced, and their truth.

The estimator is the one of the product: `chasm.models.baselines.LinearEncoder` on the tokens. Its
prediction is ``intercept + CLS part + patch part``, each part 0 where the stream has its train
mean, so that the `mean` operation leaves a part out. An encoder with a third kernel, the product
of the two, stands for models in which the streams interact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablations.values import CoalitionValues, TestSet
from ablations.worlds import World
from chasm.models.baselines import BANDS, LinearEncoder
from chasm.models.kernels import FeatureKernels, linear_kernels
from chasm.noise_ceiling import noise_ceiling, unit_ncsnr

FloatArray = NDArray[np.floating[Any]]

COALITIONS: Mapping[str, tuple[bool, bool]] = {
    "none": (False, False),
    "local": (True, False),
    "global": (False, True),
    "both": (True, True),
}
"""Whether the local and the global stream are intact."""

INTERACTION_BANDS = np.array(
    [
        [c * (1 - share), (1 - c) * (1 - share), share]
        for share in (0.0, 0.3, 0.6)
        for c in (0.1, 0.3, 0.5, 0.7, 0.9)
    ],
    dtype=np.float32,
)
"""Shares of the (CLS, patches, product) kernels searched where the streams interact."""


@dataclass(frozen=True)
class WorldEncoder:
    """A fitted encoder of a world, evaluated on its test and population images.

    Attributes
    ----------
    test, population
        Coalition -> (images, voxels).
    interchange
        (donors, images, voxels): CLS of image ``donor[k, j]``, patches of image j.
    donor
        (donors, images), rows of the test set, never j itself.
    """

    test: Mapping[str, FloatArray]
    population: Mapping[str, FloatArray]
    interchange: FloatArray
    donor: NDArray[np.int64]


def estimated_ceiling(world: World) -> FloatArray:
    """Noise ceiling of the mean test response from the repeats of all trials, (voxels,)."""
    repeats = np.bincount(world.image)[world.test]
    return noise_ceiling(unit_ncsnr(world.trials, world.image), repeats)


def world_test_set(
    world: World, early: tuple[str, ...], higher: tuple[str, ...], *, n_boot: int, seed: int
) -> TestSet:
    """Give the test images of a world to the effects, with the estimated ceiling."""
    return TestSet(
        subject="world",
        dataset="token worlds",
        simulated=True,
        unit="voxel",
        target=world.mean_response(world.test),
        train_mean=world.mean_response(world.train).mean(axis=0),
        ceiling=estimated_ceiling(world),
        regions=world.layout.regions(),
        early=early,
        higher=higher,
        seed_of_bootstrap=seed,
        n_boot=n_boot,
    )


def coalition_values(encoder: WorldEncoder) -> CoalitionValues:
    """Give an encoder of a world to the effects."""
    donors = (encoder.interchange, encoder.donor) if len(encoder.donor) else None
    return CoalitionValues("banded ridge", "linear", 0, encoder.test, interchange=donors)


def derangements(n_images: int, n_donors: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Donor of every image, never itself: (donors, images), each row a permutation."""
    order = rng.permutation(n_images)
    shifts = 1 + rng.permutation(n_images - 1)[:n_donors]
    donor = np.empty((len(shifts), n_images), dtype=np.int64)
    for row, shift in zip(donor, shifts, strict=True):
        row[order] = np.roll(order, shift)
    return donor


def token_kernels(world: World) -> dict[str, FeatureKernels]:
    """Kernels of the CLS and the patch tokens; test rows are the test, then the population."""
    rest = np.concatenate([world.test, world.population])
    tokens = {"cls": world.cls, "patches": world.patches}
    return {name: linear_kernels(values, world.train, rest) for name, values in tokens.items()}


def fit_additive(world: World, n_donors: int, rng: np.random.Generator) -> WorldEncoder:
    """Banded ridge on CLS and patches."""
    kernels = token_kernels(world)
    encoder = LinearEncoder(("cls", "patches"), shares=BANDS)
    encoder.fit(kernels, world.mean_response(world.train))
    cls, patches = (_test(kernels[s]) @ encoder.dual_of(s) for s in ("cls", "patches"))
    values = {
        name: encoder.intercept_ + local * patches + global_ * cls
        for name, (local, global_) in COALITIONS.items()
    }
    donor = derangements(len(world.test), n_donors, rng)
    n_test = len(world.test)
    swapped = encoder.intercept_ + cls[:n_test][donor] + patches[:n_test]
    return _split(values, n_test, swapped, donor)


def fit_interacting(
    world: World, n_donors: int, rng: np.random.Generator, degree: int = 1
) -> WorldEncoder:
    """Banded ridge on CLS, patches and products of their centred features.

    Parameters
    ----------
    world
        To fit.
    n_donors
        Donors of the interchange.
    rng
        Of the donors.
    degree
        Of the CLS features in the products.
    """
    kernels = token_kernels(world)
    cls, patches = kernels["cls"], kernels["patches"]
    kernels["product"] = _product(cls, patches, degree)
    encoder = LinearEncoder(("cls", "patches", "product"), shares=INTERACTION_BANDS)
    encoder.fit(kernels, world.mean_response(world.train))
    duals = [encoder.dual_of(space) for space in encoder.spaces]
    parts = [_test(kernels[s]) @ dual for s, dual in zip(encoder.spaces, duals, strict=True)]
    values = {
        name: encoder.intercept_ + local * parts[1] + global_ * (parts[0] + local * parts[2])
        for name, (local, global_) in COALITIONS.items()
    }
    n_test = len(world.test)
    donor = derangements(n_test, n_donors, rng)
    scale = np.mean(np.diagonal(cls.train**degree * patches.train))
    swapped = np.stack(
        [
            encoder.intercept_
            + parts[0][:n_test][row]
            + parts[1][:n_test]
            + (_test(cls)[:n_test][row] ** degree * _test(patches)[:n_test] / scale) @ duals[2]
            for row in donor
        ]
    )
    return _split(values, n_test, swapped, donor)


def _product(cls: FeatureKernels, patches: FeatureKernels, degree: int) -> FeatureKernels:
    """Kernel of the products of CLS and patch features, scaled to a mean train diagonal of 1."""
    train = cls.train**degree * patches.train
    scale = np.mean(np.diagonal(train))
    test = _test(cls) ** degree * _test(patches)
    return FeatureKernels(train / scale, test / scale, cls.n_features**degree * patches.n_features)


def _test(kernel: FeatureKernels) -> NDArray[np.float32]:
    assert kernel.test is not None
    return kernel.test


def _split(
    values: Mapping[str, FloatArray], n_test: int, swapped: FloatArray, donor: NDArray[np.int64]
) -> WorldEncoder:
    return WorldEncoder(
        {name: v[:n_test] for name, v in values.items()},
        {name: v[n_test:] for name, v in values.items()},
        swapped,
        donor,
    )


def population_r2(
    world: World, predictions: Mapping[str, FloatArray], train_mean: FloatArray
) -> dict[str, FloatArray]:
    """R2 of a frozen encoder over all images, without sampling error of images or noise.

    Expected squared errors about the mean of the test's repeats: the noise enters by its known
    variance.

    Parameters
    ----------
    world
        Whose population images are used.
    predictions
        Name -> (population images, voxels).
    train_mean
        (voxels,), the prediction whose R2 is 0.

    Returns
    -------
    dict
        Name -> (voxels,).
    """
    expected = world.expected(world.population)
    repeats = np.bincount(world.image)[world.test].mean()
    noise = 1 / (1 + world.layout.q) / repeats
    total = np.square(expected - train_mean).mean(axis=0) + noise
    return {
        name: 1 - (np.square(expected - values).mean(axis=0) + noise) / total
        for name, values in predictions.items()
    }
