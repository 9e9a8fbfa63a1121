"""The noise ceiling's signal-to-noise ratio from the betas of a store that is being written."""

from __future__ import annotations

import numpy as np

from chasm.data.nsd import BETA_SCALE
from chasm.data.store_writer import StoreWriter
from chasm.noise_ceiling import NoiseAccumulator, ncsnr_from_variances, repeat_groups
from chasm.progress import track

NCSNR_MIN_IMAGES = 50
"""Below this many images with exactly three trials, all repeated images are pooled for ncsnr."""

_BLOCK_BYTES = 2 << 20
"""Betas of repeated images that are handled at once; what the processor's cache holds."""


def recompute_ncsnr(
    writer: StoreWriter,
    image_ids: np.ndarray,
    session_index: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
) -> tuple[np.ndarray, dict[str, int]]:
    """Recompute ncsnr as NSD does from the betas written so far, some images at a time.

    Parameters
    ----------
    writer
        Holds the betas of all trials, percent signal change x 300.
    image_ids, session_index
        Image and 0-based position of the session of every trial, (trials,).
    mean, std
        Session statistics, (sessions, voxels), percent signal change.

    Returns
    -------
    ncsnr, facts
        (voxels,) and, for the attributes of /voxels, the number of images behind it and how
        many repeats they have (0: mixed).
    """
    n_voxels = mean.shape[1]
    groups = repeat_groups(image_ids)
    if len(groups.get(3, ())) >= NCSNR_MIN_IMAGES:
        groups = {3: groups[3]}
    noise = NoiseAccumulator(n_voxels)
    mean, std = BETA_SCALE * mean, BETA_SCALE * std
    for k, trials in groups.items():
        if k < 2:
            continue
        block = max(1, _BLOCK_BYTES // (8 * k * n_voxels))
        starts = range(0, len(trials), block)
        for start in track(starts, f"noise ceiling, {k} repeats"):
            part = trials[start : start + block]
            values = writer.read(part.ravel()).astype(np.float32)
            for row, session in zip(values, session_index[part.ravel()], strict=True):
                row -= mean[session]
                row /= std[session]
            noise.update(values.reshape(*part.shape, -1))
    facts = {"ncsnr_images": noise.n_images, "ncsnr_repeats": 3 if set(groups) == {3} else 0}
    return ncsnr_from_variances(1 - noise.variance, noise.variance), facts
