"""The simulated brain: grid, hemispheres, cortical shell, ROI territories, pRFs.

Each hemisphere is an ellipsoid; its cortex is a shell. Seen from the occipital pole, the
early areas are wedges as in a flattened visual cortex: eccentricity grows away from the
pole, polar angle runs across the wedges and turns back at their borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft

from chasm.data.simulation.atlases import (
    AREAS,
    ATLASES,
    DISCS,
    ECCENTRICITY_EDGES,
    HIGHER,
    WEDGES,
    label_name,
)
from chasm.data.simulation.config import (
    VOXEL_SIZE_MM,
    SimulationConfig,
    Stream,
    random_stream,
)

AREA_NAMES = tuple(AREAS)
EARLY_BORDER_DEG = 64.0
"""Angle from the occipital pole at which the early and mid areas end."""
HIGHER_EXTENT_DEG = 42.0
"""Extent of the higher areas beyond that border."""
MAX_ECCENTRICITY_DEG = 4.6


@dataclass(frozen=True)
class Cortex:
    """Geometry of one subject; brain voxels are in C-order of the (X, Y, Z) volume.

    Parameters
    ----------
    shape
        Volume shape (X, Y, Z); +x is right, +y anterior, +z superior.
    brain
        (voxels, 3) indices of the brain voxels.
    cortical
        (voxels,) True where a brain voxel is cortex.
    right
        (voxels,) True in the right hemisphere.
    area
        (voxels,) index into `AREA_NAMES`, −1 outside visual cortex.
    eccentricity, polar_angle
        (voxels,) pRF centre in degrees of visual angle, and in radians counterclockwise
        from the right horizontal meridian; 0 outside visual cortex.
    """

    shape: tuple[int, int, int]
    brain: np.ndarray
    cortical: np.ndarray
    right: np.ndarray
    area: np.ndarray
    eccentricity: np.ndarray
    polar_angle: np.ndarray

    @property
    def visual(self) -> np.ndarray:
        """Rows of the brain voxels inside nsdgeneral, in mask order."""
        return np.flatnonzero(self.area >= 0)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel to millimetre, RAS, origin at the volume's centre."""
        affine = np.diag([VOXEL_SIZE_MM] * 3 + [1.0])
        affine[:3, 3] = -VOXEL_SIZE_MM * (np.array(self.shape) - 1) / 2
        return affine

    def volume(self, values: np.ndarray, fill: float, dtype: type) -> np.ndarray:
        """Put (voxels,) values of the brain into an (X, Y, Z) volume filled with `fill`."""
        volume: np.ndarray = np.full(self.shape, fill, dtype)
        volume[tuple(self.brain.T)] = values
        return volume

    def labels(self, atlas: str) -> np.ndarray:
        """(voxels,) labels of an atlas: −1 not cortex, 0 cortex without label, k label."""
        labels = np.where(self.cortical, 0, -1).astype(np.int16)
        if atlas == "prf-eccrois":
            # NSD maps eccentricity where it has population receptive field areas.
            mapped = self.labels("prf-visualrois") > 0
            labels[mapped] = 1 + np.digitize(self.eccentricity[mapped], ECCENTRICITY_EDGES)
            return labels
        numbers = {name: number for number, name in ATLASES[atlas].items()}
        for index, name in enumerate(AREA_NAMES):
            label = label_name(AREAS[name], atlas)
            if label:
                labels[self.area == index] = numbers[label]
        return labels


def make_cortex(config: SimulationConfig, subject: int) -> Cortex:
    """Build one subject's brain from its grid; ROI centres and sizes vary by subject."""
    rng = random_stream(config.seed, Stream.CORTEX, subject)
    shape = config.grids[subject - 1]
    index = np.indices(shape).reshape(3, -1).T
    position = index - (np.array(shape) - 1) / 2
    # Two ellipsoids side by side, one voxel off the volume's faces, half a voxel apart.
    axes = np.array([(shape[0] - 2.5) / 4, (shape[1] - 2) / 2, (shape[2] - 2) / 2])
    right = position[:, 0] > 0
    side = np.where(right, 1.0, -1.0)
    local = position.copy()
    local[:, 0] -= side * (axes[0] + 0.25)
    radius = np.linalg.norm(local / axes, axis=1)
    inside = radius <= 1
    slope = np.linalg.norm(local / axes**2, axis=1) / np.maximum(radius, 1e-9)
    depth = (1 - radius) / np.maximum(slope, 1e-9)

    brain = index[inside]
    unit = (local / axes)[inside] / np.maximum(radius[inside], 1e-9)[:, None]
    unit[:, 0] *= -side[inside]
    cortical = depth[inside] * VOXEL_SIZE_MM <= config.cortex_thickness_mm
    theta = np.rad2deg(np.arccos(np.clip(-unit[:, 1], -1, 1)))
    psi = np.rad2deg(np.arctan2(unit[:, 2], unit[:, 0]))
    area = np.full(len(brain), -1, np.int16)
    for hemisphere in (~right[inside], right[inside]):
        here = hemisphere & cortical
        psi[here] = (psi[here] + rng.normal(0, 3) + 180) % 360 - 180
        area[here] = _territories(theta[here], psi[here], rng)
    eccentricity, angle = _retinotopy(area, theta, psi, right[inside], rng)
    return Cortex(shape, brain, cortical, right[inside], area, eccentricity, angle)


def _territories(theta: np.ndarray, psi: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Area index of one hemisphere's voxels by their direction; −1 where no area reaches."""
    unit = _direction(np.deg2rad(theta), np.deg2rad(psi)).T
    area = np.full(len(theta), -1)
    for wedge in WEDGES:
        inside = (theta >= wedge.theta[0]) & (theta < wedge.theta[1])
        inside &= (psi >= wedge.psi[0]) & (psi < wedge.psi[1])
        area[inside] = AREA_NAMES.index(wedge.area)
    nearest = np.full(len(theta), np.inf)
    for disc in DISCS:
        polar, around = np.deg2rad(np.array([disc.theta, disc.psi]) + rng.normal(0, 2.0, 2))
        radius = disc.radius * np.exp(rng.normal(0, 0.08))
        distance = np.arccos(np.clip(unit @ _direction(polar, around), -1, 1))
        relative = np.rad2deg(distance) / radius
        inside = (relative <= 1) & (relative < nearest)
        area[inside] = AREA_NAMES.index(disc.area)
        nearest[inside] = relative[inside]
    return area


def _direction(theta: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Return unit vectors (3, ...) medial, anterior, superior of angles in radians."""
    return np.stack([np.sin(theta) * np.cos(psi), -np.cos(theta), np.sin(theta) * np.sin(psi)])


def _retinotopy(
    area: np.ndarray,
    theta: np.ndarray,
    psi: np.ndarray,
    right: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Eccentricity (degrees) and polar angle (radians) of every voxel's pRF centre.

    Left hemisphere, right half of the visual field; ventral, upper quadrant. Within a
    quadrant V1 runs from the horizontal meridian to the vertical one, V2 back, V3 forth.
    """
    tier = np.array([AREAS[name].tier for name in AREA_NAMES])[area]
    way = theta / EARLY_BORDER_DEG
    way = np.where(tier == HIGHER, (theta - EARLY_BORDER_DEG) / HIGHER_EXTENT_DEG, way)
    way = np.clip(way + rng.normal(0, 0.03, len(way)), 0, 1)
    # Cortical magnification: eccentricity grows exponentially along the cortex.
    eccentricity = 0.4 * (np.exp(np.log1p(MAX_ECCENTRICITY_DEG / 0.4) * way) - 1) + 0.05

    # Elevation within the hemifield: −1 lower vertical, 0 horizontal, 1 upper vertical.
    elevation = np.clip(-np.sin(np.deg2rad(psi)) * 0.8, -1, 1)
    borders = {"V1": (0, 32, False), "V2": (32, 60, True), "V3": (60, 86, False)}
    for name, (low, high, backward) in borders.items():
        fraction = np.clip((np.abs(psi) - low) / (high - low), 0, 1)
        fraction = 1 - fraction if backward else fraction
        for half, sign in (("v", 1), ("d", -1)):
            here = area == AREA_NAMES.index(name + half)
            elevation[here] = sign * fraction[here]
    hv4 = area == AREA_NAMES.index("hV4")
    elevation[hv4] = np.interp(psi[hv4], [-124, -86], [-1, 1])

    quadrant = np.where(np.abs(elevation) < 1e-9, 0.0, elevation * np.pi / 2)
    angle = np.where(right, np.pi - quadrant, quadrant)
    visual = area >= 0
    return np.where(visual, eccentricity, 0.0), np.where(visual, angle, 0.0)


class SmoothFields:
    """Gaussian random fields of unit variance whose correlation falls as exp(−d / length).

    Made on the periodic grid by the Fourier transform of the correlation function.

    Parameters
    ----------
    shape
        Volume shape (X, Y, Z).
    length_mm
        Distance at which the correlation is 1/e.
    """

    def __init__(self, shape: tuple[int, int, int], length_mm: float) -> None:
        self.shape = shape
        lags = [np.minimum(np.arange(n), n - np.arange(n)) * VOXEL_SIZE_MM for n in shape]
        squared = [lag**2 for lag in lags]
        distance = np.sqrt(
            squared[0][:, None, None] + squared[1][None, :, None] + squared[2][None, None, :]
        )
        power = np.maximum(scipy.fft.fftn(np.exp(-distance / length_mm)).real, 0)
        power *= distance.size / power.sum()
        self._amplitude = np.sqrt(power).astype(np.float32)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw (n, X, Y, Z) float32 fields.

        The real and imaginary parts of the transform of complex white noise are two
        independent fields.
        """
        pairs = (n + 1) // 2
        white = rng.standard_normal((pairs, *self.shape, 2), np.float32).view(np.complex64)[..., 0]
        white *= self._amplitude
        fields = scipy.fft.fftn(white, axes=(1, 2, 3), overwrite_x=True)
        fields /= np.float32(np.sqrt(self._amplitude.size))
        return np.concatenate([fields.real, fields.imag])[:n]
