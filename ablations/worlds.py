"""Simulated brains at the level of tokens, in which the routing of every voxel is known.

A world is a set of images given directly as tokens, a CLS token (the gist: categories and scene
type) and patch tokens (local energies of their cells), and voxels that read them. Signal of a
voxel: ``s = sqrt((1-i) w) L + sqrt((1-i)(1-w)) G + sqrt(i) M``, with L a receptive field on the
energies, G a tuning to the gist and M a multiplicative term, all standardised. The energies are
orthogonal to the whole gist over the images of a world, so that the local share is exactly w. A
trial is ``sqrt(q/(1+q)) s + sqrt(1/(1+q)) noise`` with q = ncsnr squared, so that the ceiling is
exact too. Everything here is SIMULATED; it calibrates the suite and says nothing about a brain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from chasm.evaluation.regions import Region
from chasm.noise_ceiling import noise_ceiling

FloatArray = NDArray[np.floating[Any]]
Multiplicative = Literal["product", "gain"]

ATLAS = "simulated"
EARLY = ("V1", "V2", "V3", "V4")
HIGHER = ("FFA", "PPA", "EBA", "VWFA")

CEILING_SPREAD = 0.6
"""Standard deviation of log q over the voxels of an ROI."""
TUNING_JITTER = 0.35
"""Voxel's own tuning to the gist, beside an ROI prototype of standard deviation .5."""
NOISE_LENGTH_MM, VOXEL_MM, NOISE_GLOBAL_SHARE = 4.0, 1.8, 0.1
_SHEET_ROWS = 6


@dataclass(frozen=True)
class Sizes:
    """How large a world is.

    Attributes
    ----------
    n_train, n_test
        Images; a train image has 1 to `repeats` trials, a test image has `repeats`.
    n_population
        Further images, whose noise-free signal gives the population values of an encoder.
    n_repeated
        Images beyond train and test that are shown `repeats` times, only for the estimate of
        the noise ceiling (by default as many as make it come from NSD's 10,000 images).
    n_categories, n_scenes
        Parts of the gist: presence of each category, one-hot scene type.
    side, n_channels
        Patches are the side x side cells of the image, each with so many energies.
    n_voxels
        Voxels of each ROI.
    repeats
        Most trials of an image.
    """

    n_train: int = 400
    n_test: int = 515
    n_population: int = 9000
    n_repeated: int = 9000
    n_categories: int = 8
    n_scenes: int = 6
    side: int = 5
    n_channels: int = 4
    n_voxels: int = 60
    repeats: int = 3


@dataclass(frozen=True)
class Layout:
    """What is planted where, one entry per voxel.

    Attributes
    ----------
    names
        ROIs.
    region
        (voxels,), index into `names`; the voxels of an ROI lie side by side.
    local_share
        (voxels,), w.
    q
        (voxels,), signal variance over noise variance of a trial: ncsnr squared.
    """

    names: tuple[str, ...]
    region: NDArray[np.int64]
    local_share: FloatArray
    q: FloatArray

    def regions(self) -> tuple[Region, ...]:
        """Give the ROIs as the evaluation knows them, a voxel being a unit."""
        return tuple(
            Region(name, "roi", ATLAS, (self.region == i) * 1.0, np.flatnonzero(self.region == i))
            for i, name in enumerate(self.names)
        )


@dataclass(frozen=True)
class World:
    """Images, tokens and responses of one simulated brain.

    Attributes
    ----------
    layout
        What is planted.
    cls
        (images, 1, gist) float32.
    patches
        (images, cells, channels) float32.
    parts
        Of the signal: "local", "global" and, where planted, "interaction", each (images, voxels);
        their sum has unit variance over the images.
    trials
        (trials, voxels) of the train and test images, then of the repeated ones.
    image
        (trials,) row of the image of each trial.
    train, test, population
        Rows of the images.
    """

    layout: Layout
    cls: NDArray[np.float32]
    patches: NDArray[np.float32]
    parts: Mapping[str, FloatArray]
    trials: NDArray[np.float32]
    image: NDArray[np.int64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    population: NDArray[np.int64]

    def expected(self, rows: NDArray[np.int64]) -> FloatArray:
        """Responses to some images without noise, (images, voxels)."""
        signal = sum(part[rows] for part in self.parts.values())
        return np.sqrt(self.layout.q / (1 + self.layout.q)) * signal

    @property
    def ceiling(self) -> FloatArray:
        """True noise ceiling of the mean test response, (voxels,) in units of r2."""
        repeats = len(self.trials_of(self.test)) // len(self.test)
        return noise_ceiling(np.sqrt(self.layout.q), repeats)

    def trials_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Trials that show one of these images, in the order of `image`."""
        return np.flatnonzero(np.isin(self.image, rows))

    def mean_response(self, rows: NDArray[np.int64]) -> FloatArray:
        """Mean over trials of each image: (images, voxels); `rows` ascend."""
        trials = self.trials_of(rows)
        _, first, count = np.unique(self.image[trials], return_index=True, return_counts=True)
        total = np.add.reduceat(self.trials[trials], first, axis=0, dtype=np.float64)
        mean: FloatArray = total / count[:, None]
        return mean


def make_layout(
    local_share: tuple[float, float],
    ceiling: tuple[float, float],
    n_voxels: int,
    repeats: int,
    rng: np.random.Generator,
) -> Layout:
    """Plant a local share and a median ceiling in the early and in the higher ROIs.

    Parameters
    ----------
    local_share, ceiling
        (early, higher): w, and the median NC of the mean of `repeats` trials.
    n_voxels
        Voxels of each ROI; their q are the same quantiles of a log-normal in every ROI.
    repeats
        Trials per test image.
    rng
        Deals out the quantiles.
    """
    names = EARLY + HIGHER
    region = np.repeat(np.arange(len(names)), n_voxels)
    higher = region >= len(EARLY)
    median = np.where(higher, ceiling[1], ceiling[0])
    deviates = np.tile(ndtri((np.arange(n_voxels) + 0.5) / n_voxels), (len(names), 1))
    spread = np.exp(CEILING_SPREAD * rng.permuted(deviates, axis=1).ravel())
    return Layout(
        names,
        region,
        np.where(higher, local_share[1], local_share[0]),
        median / (repeats * (1 - median)) * spread,
    )


def make_world(
    layout: Layout,
    sizes: Sizes,
    rng: np.random.Generator,
    *,
    leak: float = 0.0,
    interaction: float = 0.0,
    multiplicative: Multiplicative = "product",
) -> World:
    """Draw images, tuning and noise of one brain.

    Parameters
    ----------
    layout
        What is planted.
    sizes
        Of everything but the voxels, which `layout` lists.
    rng
        Of every draw.
    leak
        Where above 0, every patch has a further channel, which has this correlation with a
        mixture of the gist.
    interaction
        Share i of signal variance of the multiplicative term.
    multiplicative
        "product": L G; "gain": L G^2, a gain that is not linear in the gist.
    """
    n_images = sizes.n_train + sizes.n_test + max(sizes.n_population, sizes.n_repeated)
    gist = _draw_gist(n_images, sizes, rng)
    energy = _orthogonal(_draw_energy(n_images, sizes, rng), gist)
    local = _standardised(energy @ _local_tuning(layout, sizes, rng))
    global_ = _standardised(gist @ _global_tuning(layout, gist.shape[1], rng))
    parts = _mixed(layout.local_share, local, global_, interaction, multiplicative)
    patches = energy.reshape(n_images, sizes.side**2, sizes.n_channels)
    if leak > 0:
        patches = np.concatenate([patches, _leaked(gist, leak, sizes, rng)[:, :, None]], axis=2)
    first = np.cumsum([0, sizes.n_train, sizes.n_test, sizes.n_population])
    train, test, population = (np.arange(a, b) for a, b in pairwise(first))
    repeats = np.full(sizes.n_train + sizes.n_test + sizes.n_repeated, sizes.repeats)
    repeats[train] = rng.integers(1, sizes.repeats + 1, sizes.n_train)
    image = np.repeat(np.arange(len(repeats)), repeats)
    return World(
        layout=layout,
        cls=gist[:, None].astype(np.float32),
        patches=patches.astype(np.float32),
        parts=parts,
        trials=_draw_trials(reduce(np.add, parts.values()), image, layout.q, rng),
        image=image,
        train=train,
        test=test,
        population=population,
    )


def _draw_gist(n_images: int, sizes: Sizes, rng: np.random.Generator) -> FloatArray:
    """Presence of categories and one-hot scene type, standardised: (images, gist)."""
    shown = rng.random((n_images, sizes.n_categories)) < 0.25
    presence = shown * rng.uniform(0.3, 1, shown.shape)
    type_ = rng.integers(max(1, sizes.n_scenes), size=(n_images, 1))
    scene = type_ == np.arange(sizes.n_scenes)
    return _standardised(np.concatenate([presence, scene], axis=1))


def _draw_energy(n_images: int, sizes: Sizes, rng: np.random.Generator) -> FloatArray:
    """Positive, skewed energies, smooth over cells and channels: (images, cells * channels)."""
    cells = _cells(sizes.side)
    distance = np.linalg.norm(cells[:, None] - cells[None], axis=2)
    over_cells = np.linalg.cholesky(np.exp(-distance / 1.5))
    over_channels = np.linalg.cholesky(0.7 * np.eye(sizes.n_channels) + 0.3)
    white = rng.normal(size=(n_images, len(cells), sizes.n_channels))
    field = np.einsum("ab,nbd,cd->nac", over_cells, white, over_channels, optimize=True)
    return np.exp(0.4 * field).reshape(n_images, -1)


def _leaked(gist: FloatArray, leak: float, sizes: Sizes, rng: np.random.Generator) -> FloatArray:
    """One noisy mixture of the gist per cell, unit variance: (images, cells)."""
    mixture = _standardised(gist @ rng.normal(size=(gist.shape[1], sizes.side**2)))
    mixed: FloatArray = leak * mixture + np.sqrt(1 - leak**2) * rng.normal(size=mixture.shape)
    return mixed


def _cells(side: int) -> FloatArray:
    """Row and column of every cell, raster order: (cells, 2)."""
    return np.stack(np.divmod(np.arange(side**2), side), axis=1).astype(np.float64)


def _orthogonal(values: FloatArray, gist: FloatArray) -> FloatArray:
    """Standardise after taking out every linear function of the gist."""
    left, strength, _ = np.linalg.svd(gist, full_matrices=False)
    basis = left[:, strength > 1e-9 * strength[0]]
    centred = values - values.mean(axis=0)
    return _standardised(centred - basis @ (basis.T @ centred))


def _standardised(values: FloatArray) -> FloatArray:
    """Zero mean and unit variance over images."""
    centred = values - values.mean(axis=0)
    result: FloatArray = centred / centred.std(axis=0)
    return result


def _mixed(
    w: FloatArray,
    local: FloatArray,
    global_: FloatArray,
    interaction: float,
    multiplicative: Multiplicative,
) -> dict[str, FloatArray]:
    """Parts of the signal, from standardised drives (images, voxels)."""
    parts = {
        "local": np.sqrt((1 - interaction) * w) * local,
        "global": np.sqrt((1 - interaction) * (1 - w)) * global_,
    }
    if interaction > 0:
        factor = global_ if multiplicative == "product" else np.square(global_)
        parts["interaction"] = np.sqrt(interaction) * _multiplied(local, factor, global_)
    return parts


def _multiplied(local: FloatArray, factor: FloatArray, global_: FloatArray) -> FloatArray:
    """Standardised product, without what is linear in either drive."""
    product = local * factor
    product -= (product * local).mean(axis=0) * local
    product -= (product * global_).mean(axis=0) * global_
    return _standardised(product)


def _local_tuning(layout: Layout, sizes: Sizes, rng: np.random.Generator) -> FloatArray:
    """Gaussian receptive field times channel weights: (cells * channels, voxels)."""
    n_voxels = len(layout.region)
    centre = rng.uniform(0, sizes.side - 1, (n_voxels, 2))
    spread = 0.8 * np.exp(rng.normal(0, 0.3, n_voxels))
    squared = np.square(_cells(sizes.side)[:, None] - centre).sum(axis=2)
    field = np.exp(-squared / (2 * spread**2))
    channels = np.exp(0.5 * rng.normal(size=(sizes.n_channels, n_voxels)))
    return (field[:, None] * channels[None]).reshape(-1, n_voxels)


def _global_tuning(layout: Layout, n_gist: int, rng: np.random.Generator) -> FloatArray:
    """Prototype of the ROI plus jitter of the voxel: (gist, voxels)."""
    prototype = rng.normal(0, 0.5, (n_gist, len(layout.names)))
    jitter = TUNING_JITTER * rng.normal(size=(n_gist, len(layout.region)))
    tuning: FloatArray = prototype[:, layout.region] + jitter
    return tuning


def _draw_trials(
    signal: FloatArray, image: NDArray[np.int64], q: FloatArray, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Add unit noise, exponential over a flat sheet of voxels, with a part common to a trial."""
    n_voxels = len(q)
    place = VOXEL_MM * np.stack(np.divmod(np.arange(n_voxels), _SHEET_ROWS), axis=1)
    distance = np.linalg.norm(place[:, None] - place[None], axis=2)
    factor = np.linalg.cholesky((1 - NOISE_GLOBAL_SHARE) * np.exp(-distance / NOISE_LENGTH_MM))
    factor = (np.sqrt(1 / (1 + q))[:, None] * factor).astype(np.float32)
    trials = rng.standard_normal((len(image), n_voxels), dtype=np.float32) @ factor.T
    common = rng.standard_normal((len(image), 1), dtype=np.float32)
    trials += np.sqrt(NOISE_GLOBAL_SHARE / (1 + q)).astype(np.float32) * common
    trials += (np.sqrt(q / (1 + q)) * signal).astype(np.float32)[image]
    return trials


def region_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Keys of simulated ROIs, as the sets of a contrast name them."""
    return tuple(f"{ATLAS}:{name}" for name in names)
