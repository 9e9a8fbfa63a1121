"""From images to responses: local and global drives, signal, noise.

Signal of a voxel: s = √((1−ι)w)·L + √((1−ι)(1−w))·G + √ι·LG, where L (local drive), G
(global drive) and their product LG have zero mean, unit variance and no correlation over
the subject's images, w is the planted local share and ι the interaction share. Response:
y = √(q/(1+q))·s + √(1/(1+q))·ε with q = ncsnr².
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.fft
from PIL import Image
from scipy.special import ndtri

from chasm.data.simulation.atlases import AREAS
from chasm.data.simulation.config import (
    FIELD_OF_VIEW_DEG,
    REPEATS,
    SimulationConfig,
    Stream,
    random_stream,
)
from chasm.data.simulation.cortex import AREA_NAMES, Cortex, SmoothFields
from chasm.data.simulation.objects import CATEGORIES
from chasm.data.simulation.stimuli import SCENES, Latents

WORKING_PIXELS = 64
MARGIN_PIXELS = 16
CELLS = 32
"""Contrast energy is kept on CELLS × CELLS cells of the image."""
ORIENTATIONS_DEG = (0.0, 45.0, 90.0, 135.0)
FREQUENCIES_CPD = (0.6, 1.2, 2.4)
"""Preferred contours and spatial frequencies (cycles per degree) of the energy channels."""
GIST_NAMES = (*CATEGORIES, *(scene.name for scene in SCENES))
CEILING_SPREAD = 0.6
"""Standard deviation of log q over the voxels of an area."""
TUNING_JITTER = 0.35


@dataclass(frozen=True)
class Tuning:
    """What is planted in each nsdgeneral voxel (mask order, first axis of every array).

    Parameters
    ----------
    x, y, sigma
        (voxels,) pRF centre (right, up) and standard deviation, degrees of visual angle.
    exponent
        (voxels,) compressive exponent of the local drive.
    local
        (voxels, 12) weights on the energy channels: frequency-major, orientation-minor.
    gist
        (voxels, 14) weights on `GIST_NAMES`.
    w
        (voxels,) local share of the additive signal variance.
    q
        (voxels,) signal variance / noise variance of a single trial: ncsnr².
    """

    x: np.ndarray
    y: np.ndarray
    sigma: np.ndarray
    exponent: np.ndarray
    local: np.ndarray
    gist: np.ndarray
    w: np.ndarray
    q: np.ndarray


def make_tuning(config: SimulationConfig, subject: int, cortex: Cortex) -> Tuning:
    """Draw what one subject's voxels respond to; ROI prototypes are shared by subjects."""
    rng = random_stream(config.seed, Stream.TUNING, subject)
    visual = cortex.visual
    area = cortex.area[visual]
    areas = [AREAS[name] for name in AREA_NAMES]
    eccentricity, angle = cortex.eccentricity[visual], cortex.polar_angle[visual]
    intercept, slope = np.array([a.receptive_field for a in areas])[area].T
    size = (intercept + slope * eccentricity) * np.exp(rng.normal(0, 0.15, len(area)))

    n_channels = len(ORIENTATIONS_DEG) * len(FREQUENCIES_CPD)
    smooth = SmoothFields(cortex.shape, config.noise_length_mm)
    voxels = tuple(cortex.brain[visual].T)
    fields = smooth.draw(rng, 4 + len(GIST_NAMES))[:, *voxels]
    share = np.array(config.local_share)[np.array([a.tier for a in areas])[area]]
    local = _channel_weights(eccentricity, fields[:3])
    return Tuning(
        x=eccentricity * np.cos(angle),
        y=eccentricity * np.sin(angle),
        sigma=size,
        exponent=np.array([a.exponent for a in areas])[area],
        local=local.reshape(len(area), n_channels),
        gist=_prototypes(config.seed)[area] + TUNING_JITTER * fields[4:].T,
        w=np.clip(share + rng.normal(0, config.local_share_jitter, len(area)), 0, 1),
        q=_draw_q(area, np.array([a.ceiling for a in areas]), fields[3]),
    )


def _channel_weights(eccentricity: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Weights (voxels, frequencies, orientations): finer near the fovea, mildly oriented."""
    preferred = np.log2(2.0) - 0.35 * eccentricity + 0.3 * fields[0]
    octaves = np.log2(np.array(FREQUENCIES_CPD))[None] - preferred[:, None]
    frequency = np.exp(-0.5 * octaves**2)
    # Two Gaussian fields give a random direction and strength of orientation preference.
    doubled = 2 * np.deg2rad(ORIENTATIONS_DEG)[None]
    bias = fields[1][:, None] * np.cos(doubled) + fields[2][:, None] * np.sin(doubled)
    orientation = np.exp(0.5 * bias)
    return frequency[:, :, None] * orientation[:, None, :]


def _prototypes(seed: int) -> np.ndarray:
    """Weights of each area on the gist, (areas, gist)."""
    prototypes = np.zeros((len(AREA_NAMES), len(GIST_NAMES)))
    for row, name in enumerate(AREA_NAMES):
        preferences = AREAS[name].prefers
        if preferences is None:
            rng = random_stream(seed, Stream.TUNING, 0, row)
            prototypes[row] = rng.normal(0, 0.5, len(GIST_NAMES))
            continue
        for preferred, weight in preferences.items():
            prototypes[row, GIST_NAMES.index(preferred)] = weight
    return prototypes


def _draw_q(area: np.ndarray, ceilings: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Draw q per voxel: log-normal in each area, with the area's median ceiling NC(3).

    The quantiles of the distribution are dealt out by the rank of a smooth field, so that
    each area has its median whatever its size, and neighbours have similar ceilings.
    """
    q = np.zeros(len(area))
    for index in np.unique(area):
        here = np.flatnonzero(area == index)
        rank = np.argsort(np.argsort(field[here]))
        deviate = ndtri((rank + 0.5) / len(here))
        median = ceilings[index] / (REPEATS * (1 - ceilings[index]))
        q[here] = median * np.exp(CEILING_SPREAD * deviate)
    return q


def noise_ceiling(q: np.ndarray, repeats: int = REPEATS) -> np.ndarray:
    """Noise ceiling of the mean of some repeats, r² units: q / (q + 1/repeats)."""
    return q / (q + 1 / repeats)


def gist_features(latents: Latents) -> np.ndarray:
    """Presence of each category (grows with size) and scene type, (images, 14)."""
    gist = np.zeros((len(latents.scene), len(GIST_NAMES)))
    rows = np.arange(len(gist))
    gist[rows, len(CATEGORIES) + latents.scene.astype(int)] = 1
    for slot in range(latents.category.shape[1]):
        shown = latents.category[:, slot] >= 0
        presence = np.tanh(latents.size[shown, slot] / 2.5)
        np.add.at(gist, (rows[shown], latents.category[shown, slot].astype(int)), presence)
    return gist


def contrast_energy(images: Iterable[np.ndarray]) -> np.ndarray:
    """Oriented contrast energy of images at three spatial frequencies.

    Parameters
    ----------
    images
        (height, width, 3) uint8 images of any size.

    Returns
    -------
    ndarray
        (images, 12, 32, 32) float32: squared magnitude of log-Gabor quadrature pairs on
        luminance (0-1), averaged in cells; frequency-major, orientation-minor.
    """
    bank = _log_gabor_bank()
    energies = []
    inside = slice(MARGIN_PIXELS, MARGIN_PIXELS + WORKING_PIXELS)
    pooled = (CELLS, WORKING_PIXELS // CELLS)
    for image in images:
        luminance = image @ np.array([0.299, 0.587, 0.114], np.float32) / np.float32(255)
        small = np.asarray(
            Image.fromarray(luminance).resize(
                (WORKING_PIXELS, WORKING_PIXELS), Image.Resampling.BOX
            )
        )
        padded = np.pad(small - small.mean(), MARGIN_PIXELS, mode="reflect")
        filtered = scipy.fft.ifft2(scipy.fft.fft2(padded) * bank)[:, inside, inside]
        energy = filtered.real**2 + filtered.imag**2
        energies.append(energy.reshape(-1, *pooled, *pooled).mean(axis=(2, 4)))
    return np.stack(energies).astype(np.float32)


def _log_gabor_bank() -> np.ndarray:
    """One-sided log-Gabor filters in the Fourier domain, (12, pixels, pixels)."""
    side = WORKING_PIXELS + 2 * MARGIN_PIXELS
    per_degree = WORKING_PIXELS / FIELD_OF_VIEW_DEG
    fy = -scipy.fft.fftfreq(side)[:, None] * per_degree
    fx = scipy.fft.fftfreq(side)[None, :] * per_degree
    radius = np.maximum(np.hypot(fx, fy), 1e-9)
    direction = np.arctan2(fy, fx)
    filters = []
    for frequency in FREQUENCIES_CPD:
        radial = np.exp(-0.5 * (np.log2(radius / frequency) / 0.55) ** 2)
        for contour in ORIENTATIONS_DEG:
            # A contour's wave vector is perpendicular to it; one side makes it analytic.
            offset = np.angle(np.exp(1j * (direction - np.deg2rad(contour + 90))))
            filters.append(2 * radial * np.exp(-0.5 * (offset / np.deg2rad(25)) ** 2))
    return np.array(filters, np.float32)


@dataclass(frozen=True)
class Signal:
    """Noise-free responses of nsdgeneral voxels to the subject's images.

    Parameters
    ----------
    values
        (images, voxels) float32, zero mean and unit variance over the images.
    local, global_
        (images, voxels) float32 drives L and G, standardised; kept only when asked for.
    """

    values: np.ndarray
    local: np.ndarray | None = None
    global_: np.ndarray | None = None


def make_signal(
    energy: np.ndarray,
    gist: np.ndarray,
    tuning: Tuning,
    interaction: float,
    keep_drives: bool = False,
) -> Signal:
    """Mix the drives so that the planted shares hold exactly over the images.

    The local drive is made orthogonal to the whole gist, not only to the voxel's own global
    drive: no linear read-out of the gist can then explain any of the local share.

    Parameters
    ----------
    energy
        (images, 12, 32, 32) from `contrast_energy`.
    gist
        (images, 14) from `gist_features`.
    tuning
        Of the voxels.
    interaction
        Share of signal variance of the product of the drives.
    keep_drives
        Keep L and G beside the signal.
    """
    n_images, n_voxels = len(energy), len(tuning.w)
    flat = energy.reshape(n_images, -1)
    centred = gist - gist.mean(axis=0)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    basis = left[:, strength > 1e-9 * strength[0]]
    values = np.empty((n_images, n_voxels), np.float32)
    kept = [np.empty_like(values) for _ in range(2)] if keep_drives else [None, None]
    for start in range(0, n_voxels, 256):
        block = slice(start, start + 256)
        local = np.maximum(flat @ _local_weights(tuning, block), 1e-12).astype(np.float64)
        local = _standardise(local ** tuning.exponent[block], basis)
        global_ = _standardise(centred @ tuning.gist[block].T)
        w = tuning.w[block]
        mixed = np.sqrt((1 - interaction) * w) * local
        mixed += np.sqrt((1 - interaction) * (1 - w)) * global_
        if interaction > 0:
            product = local * global_
            product -= (product * local).mean(axis=0) * local
            product -= (product * global_).mean(axis=0) * global_
            mixed += np.sqrt(interaction) * _standardise(product)
        values[:, block] = mixed
        for store, drive in zip(kept, (local, global_), strict=True):
            if store is not None:
                store[:, block] = drive
    return Signal(values, *kept)


def _standardise(drive: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
    """Zero mean and unit variance over images, after taking out the span of `basis`."""
    drive = drive - drive.mean(axis=0)
    if basis is not None:
        drive -= basis @ (basis.T @ drive)
    return drive / drive.std(axis=0)


def _local_weights(tuning: Tuning, block: slice) -> np.ndarray:
    """Receptive field × channel weights of some voxels, (12 · 32 · 32, voxels)."""
    edge = FIELD_OF_VIEW_DEG / 2
    centres = (np.arange(CELLS) + 0.5) / CELLS * FIELD_OF_VIEW_DEG - edge
    spread = 2 * tuning.sigma[block] ** 2
    across = np.exp(-((centres[:, None] - tuning.x[block]) ** 2) / spread)
    down = np.exp(-((-centres[:, None] - tuning.y[block]) ** 2) / spread)
    field = down[:, None, :] * across[None, :, :]
    field /= field.sum(axis=(0, 1))
    weights = tuning.local[block].T[:, None, None, :] * field[None]
    return weights.reshape(-1, weights.shape[-1]).astype(np.float32)


def ideal_prediction(signal: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the expected z-scored betas, (images, voxels) float32: √(q/(1+q))·s."""
    return (np.sqrt(q / (1 + q)) * signal).astype(np.float32)
