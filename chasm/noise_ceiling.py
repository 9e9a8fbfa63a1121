"""Noise ceilings from repeated presentations: ncsnr, NC(k), and the ceiling of pattern correlation.

The estimators accumulate, so that a whole recording never has to be in memory.
Source: Allen et al. 2022 (NSD), Methods, "Noise ceiling estimation".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


class RunningMoments:
    """Mean and variance of rows that arrive in blocks (Chan, Golub & LeVeque 1983).

    Parameters
    ----------
    n_units
        Number of columns.

    Attributes
    ----------
    n
        Rows seen so far.
    mean
        (units,) float64.
    """

    def __init__(self, n_units: int) -> None:
        self.n = 0
        self.mean = np.zeros(n_units)
        self._squares = np.zeros(n_units)

    def update(self, rows: np.ndarray) -> None:
        """Add rows: (n, units)."""
        if not len(rows):
            return
        mean, total = rows.mean(axis=0, dtype=np.float64), self.n + len(rows)
        shift = mean - self.mean
        self._squares += np.square(rows - mean).sum(axis=0)
        self._squares += shift**2 * (self.n * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.n = total

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variance (ddof 1): (units,); NaN for fewer than two rows."""
        if self.n < 2:
            return np.full_like(self._squares, np.nan)
        return self._squares / (self.n - 1)


class NoiseAccumulator:
    """Noise variance per unit from images shown several times, pooled over images.

    Parameters
    ----------
    n_units
        Number of voxels, parcels or other units.

    Attributes
    ----------
    n_images
        Images seen so far that have at least two repeats.
    """

    def __init__(self, n_units: int) -> None:
        self.n_images = 0
        self._within = np.zeros(n_units)
        self._freedom = 0

    def update(self, repeats: np.ndarray) -> np.ndarray:
        """Add images that have the same number of repeats: (images, repeats, units).

        Returns
        -------
        np.ndarray
            (images, units) float64, their means over repeats.
        """
        n, k = repeats.shape[:2]
        values = repeats.astype(np.float64)
        means = values.mean(axis=1)
        if n and k > 1:
            values -= means[:, np.newaxis]
            self._within += np.einsum("iku,iku->u", values, values)
            self._freedom += n * (k - 1)
            self.n_images += n
        return means

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variance across repeats: (units,); NaN without repeats."""
        if not self._freedom:
            return np.full_like(self._within, np.nan)
        return self._within / self._freedom


class RepeatAccumulator:
    """Noise and signal variance per unit from images shown several times.

    Parameters
    ----------
    n_units
        Number of voxels, parcels or other units.
    """

    def __init__(self, n_units: int) -> None:
        self._noise = NoiseAccumulator(n_units)
        self._means = RunningMoments(n_units)
        self._inverse_repeats = 0.0

    def update(self, repeats: np.ndarray) -> None:
        """Add images that have the same number of repeats: (images, repeats, units)."""
        n, k = repeats.shape[:2]
        self._means.update(self._noise.update(repeats))
        self._inverse_repeats += n / k

    @property
    def n_images(self) -> int:
        """Images seen so far that have at least two repeats."""
        return self._noise.n_images

    @property
    def noise_variance(self) -> np.ndarray:
        """Unbiased variance across repeats, pooled over images: (units,); NaN without repeats."""
        return self._noise.variance

    @property
    def signal_variance(self) -> np.ndarray:
        """Variance of the image means minus the noise in them: (units,); may be negative."""
        mean_inverse = self._inverse_repeats / max(1, self._means.n)
        return self._means.variance - self.noise_variance * mean_inverse


def repeat_groups(image_ids: ArrayLike) -> dict[int, np.ndarray]:
    """Group trials by image, and images by their number of repeats.

    Parameters
    ----------
    image_ids
        (trials,) image of each trial.

    Returns
    -------
    dict
        Number of repeats k → (images, k) trial indices in trial order; images sorted by id.
    """
    order = np.argsort(np.asarray(image_ids), kind="stable")
    _, first, counts = np.unique(
        np.asarray(image_ids)[order], return_index=True, return_counts=True
    )
    return {int(k): order[first[counts == k][:, None] + np.arange(k)] for k in np.unique(counts)}


def ncsnr_from_variances(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Noise ceiling signal-to-noise ratio: sqrt(max(0, signal) / noise), (units,).

    A unit whose repeats never differ gives inf; a unit without an estimate NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.maximum(signal, 0) / noise)


def ncsnr(betas_z: np.ndarray, image_ids: ArrayLike, repeats_exactly: int | None = 3) -> np.ndarray:
    """Noise ceiling signal-to-noise ratio of session-z-scored betas, as NSD computes it.

    Noise variance is the mean over images of the unbiased variance across repeats; signal
    variance is max(0, 1 − noise variance), because z-scored betas have variance 1.

    Parameters
    ----------
    betas_z
        (trials, units), z-scored within session.
    image_ids
        (trials,) image of each trial.
    repeats_exactly
        Use images with exactly this many trials, k ≥ 2; None: all with at least two, pooled
        by degrees of freedom.

    Returns
    -------
    np.ndarray
        (units,) float64, NaN when no image qualifies.

    Raises
    ------
    ValueError
        If `repeats_exactly` is below 2.
    """
    if repeats_exactly is not None and repeats_exactly < 2:
        raise ValueError(f"repeats_exactly must be at least 2, not {repeats_exactly}")
    noise = NoiseAccumulator(betas_z.shape[1])
    for k, trials in repeat_groups(image_ids).items():
        if k == repeats_exactly or (repeats_exactly is None and k > 1):
            noise.update(betas_z[trials])
    return ncsnr_from_variances(1 - noise.variance, noise.variance)


def unit_ncsnr(values: np.ndarray, image_ids: ArrayLike) -> np.ndarray:
    """Noise ceiling signal-to-noise ratio of units of any variance, e.g. parcels or spike counts.

    One-way random-effects estimate: noise variance is the pooled variance across repeats, signal
    variance the variance of the image means minus noise variance × mean(1 / repeats).

    Parameters
    ----------
    values
        (trials, units).
    image_ids
        (trials,) image of each trial; images shown once help the signal variance only.

    Returns
    -------
    np.ndarray
        (units,) float64, NaN when no image is repeated.
    """
    accumulator = RepeatAccumulator(values.shape[1])
    for trials in repeat_groups(image_ids).values():
        accumulator.update(values[trials])
    return ncsnr_from_variances(accumulator.signal_variance, accumulator.noise_variance)


def noise_ceiling(ncsnr: ArrayLike, repeats: ArrayLike) -> np.ndarray:
    """Explainable share of the variance of means over repeats, in units of r².

    NC(k) = ncsnr² / (ncsnr² + 1/k).

    Parameters
    ----------
    ncsnr
        (units,).
    repeats
        k; or (images,) the repeats of each image, and 1/k becomes its mean over images, which is
        (n₁/1 + n₂/2 + n₃/3) / (n₁ + n₂ + n₃).

    Returns
    -------
    np.ndarray
        (units,) between 0 and 1; NaN stays NaN.

    Raises
    ------
    ValueError
        If a number of repeats is below 1.
    """
    counts = np.asarray(repeats, dtype=np.float64)
    if not counts.size or (counts < 1).any():
        raise ValueError("every image needs at least one repeat")
    ratio = np.asarray(ncsnr, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.mean(1 / counts) / ratio**2)


def image_reliability(repeat_betas: np.ndarray) -> np.ndarray:
    """Correlation across units between two repeats of an image, the mean over pairs of repeats.

    Parameters
    ----------
    repeat_betas
        (images, repeats, units); a missing repeat is NaN in all units. A unit that is NaN in a
        present repeat of any image is left out.

    Returns
    -------
    np.ndarray
        (images,), NaN for images shown once and for constant patterns.
    """
    values = np.asarray(repeat_betas)
    present = np.isfinite(values).any(axis=2)
    units = np.isfinite(values[present]).all(axis=0)
    counts = present.sum(axis=1)
    result = np.full(len(values), np.nan)
    for k in np.unique(counts[counts > 1]):
        chosen = counts == k
        patterns = values[chosen][present[chosen]].reshape(-1, k, values.shape[2])[:, :, units]
        result[chosen] = _mean_pair_correlation(patterns.astype(np.float64))
    return result


def averaged_pattern_ceiling(reliability: ArrayLike, repeats: ArrayLike) -> np.ndarray:
    """Best reachable mean pattern correlation, from the reliability ρ of one trial's pattern.

    The Spearman–Brown formula gives the reliability kρ / (1 + (k − 1)ρ) of a mean over k, and its
    square root is the correlation of that mean with the pattern free of noise; averaged over
    the images' own k.

    Parameters
    ----------
    reliability
        (...,), mean over images of `image_reliability`; below 0 counts as 0.
    repeats
        (images,), trials averaged; images without any are left out.

    Returns
    -------
    np.ndarray
        (...,), between 0 and 1; NaN stays NaN.
    """
    rho = np.maximum(np.asarray(reliability, dtype=np.float64), 0.0)
    counts = np.asarray(repeats)
    levels, images = np.unique(counts[counts > 0], return_counts=True)
    by_level = [
        n * np.sqrt(k * rho / (1 + (k - 1) * rho)) for k, n in zip(levels, images, strict=True)
    ]
    return np.sum(by_level, axis=0) / images.sum()


def pattern_ceiling(repeat_betas: np.ndarray) -> float:
    """Best reachable mean pattern correlation with the mean over repeats.

    `averaged_pattern_ceiling` of the mean of `image_reliability`.

    Parameters
    ----------
    repeat_betas
        (images, repeats, units); see `image_reliability`.

    Returns
    -------
    float
        Between 0 and 1; 0 when repeats do not agree at all; NaN when no image has two repeats.
    """
    reliability = image_reliability(repeat_betas)
    defined = reliability[np.isfinite(reliability)]
    if not len(defined):
        return float("nan")
    counts = np.isfinite(np.asarray(repeat_betas)).any(axis=2).sum(axis=1)
    return float(averaged_pattern_ceiling(defined.mean(), counts))


def _mean_pair_correlation(patterns: np.ndarray) -> np.ndarray:
    """Mean correlation over pairs of repeats: (images, k, units) → (images,)."""
    centred = patterns - patterns.mean(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred /= np.linalg.norm(centred, axis=2, keepdims=True)
    k = patterns.shape[1]
    # The sum over all pairs, diagonal included, is the squared norm of the sum over repeats.
    return (np.square(centred.sum(axis=1)).sum(axis=1) - k) / (k * (k - 1))
