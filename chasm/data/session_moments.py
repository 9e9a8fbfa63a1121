"""Exact means and standard deviations of a session's stored integers, voxel by voxel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SessionMoments:
    """Sums over trials, exact because stored betas are integers.

    Attributes
    ----------
    n
        Number of trials.
    total, squares
        (voxels,) int64, sums of the values and of their squares.
    """

    n: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, betas: np.ndarray) -> SessionMoments:
        """Sum up betas: (voxels, trials) int16."""
        squares = np.einsum("vt,vt->v", betas, betas, dtype=np.int64, casting="safe")
        return cls(betas.shape[1], betas.sum(axis=1, dtype=np.int64), squares)

    def without(self, other: SessionMoments) -> SessionMoments:
        """Moments of the trials that are not among those of `other`."""
        return SessionMoments(
            self.n - other.n, self.total - other.total, self.squares - other.squares
        )

    @property
    def zero(self) -> np.ndarray:
        """Whether every value of a voxel is zero: (voxels,) bool."""
        return self.squares == 0

    @property
    def constant(self) -> np.ndarray:
        """Whether all values of a voxel are the same: (voxels,) bool."""
        return self._spread == 0

    @property
    def mean(self) -> np.ndarray:
        """(voxels,) float64."""
        return self.total / self.n

    @property
    def std(self) -> np.ndarray:
        """Standard deviation with ddof 1: (voxels,) float64."""
        return np.sqrt(self._spread / (self.n * (self.n - 1)))

    @property
    def _spread(self) -> np.ndarray:
        """Number of trials times the sum of squared deviations: (voxels,) int64."""
        return self.n * self.squares - self.total**2
